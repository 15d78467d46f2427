"""How much a picture or clip may ask for: pixels, frames, seconds and bytes, each with its reason.

Together they keep whatever is accepted below about 1.5 GB of memory, and a picture below about five seconds.
The models work on less than 1,200 pixels a side, so no limit costs quality.
"""

from __future__ import annotations

MAX_PIXELS = 64_000_000  # of one picture: 8,000 x 8,000, 256 MB as Pillow holds it
MAX_JPEG_PIXELS = 128_000_000  # JPEG can be decoded at half size: phones take pictures of 108 million pixels
MAX_JPEG2000_PIXELS = 8_000_000  # the slowest decoder: 0.3 s for a million pixels
MAX_MOVING_PIXELS = 4096 * 4096  # of a moving picture: its decoders hold several canvases of 4 bytes a pixel
MAX_MOVING_FRAMES = 20_000  # Pillow has to visit them one by one, 0.2 ms for even the smallest
MAX_MOVING_WORK = 1_000_000_000  # pixels of all frames of a moving picture together: about 12 seconds
MAX_VIDEO_PIXELS = 36_000_000  # of one video frame: 8K; a decoder may hold 17 frames
THREADS = ((2_100_000, 8), (9_000_000, 2))  # (pixels of a video frame, threads): each holds frames; above: 1
MAX_VIDEO_FRAMES = 1_000_000  # nine hours at 30 frames per second
MAX_DECODE_SECONDS = 5.0  # of processor time for one picture, so that a busy machine refuses nothing
MAX_CLIP_BYTES = 1 << 29  # of the frames kept of one clip; larger frames are reduced while decoding
LEAST_REDUCED_SIDE = 1280  # pixels; the longer side of a reduced frame stays above what the models see
MAX_MESSAGE = 480  # characters of an error
COUNTED_AT_ONCE = 1000  # frames counted between two calls of `progress`
STALE_SECONDS = 24 * 3600  # before a temporary file counts as left by a process that was killed
