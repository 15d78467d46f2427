"""More than one prompt, one device, one machine: batch files, workers, one request over several processes.

Nothing here is imported unless it is used. batch.py is where a list of requests is worked through.
"""
