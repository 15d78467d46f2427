"""Pictures and videos: a request checked, drawn, drawn on, and the best of several chosen."""
