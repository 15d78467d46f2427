"""Measuring: speed, memory, loading, quality and overhead, against the limits of the machine and the released
procedure.
"""
