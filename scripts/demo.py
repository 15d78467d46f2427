"""`make demo`: a picture from text and an edit of a real photo, through the command line, on random weights."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "demo"


def lance(*args: str) -> None:
    """Run one command of the command line, showing it."""
    print("$ python -m lance_core", *(f'"{a}"' if " " in a else a for a in args), flush=True)
    subprocess.run([sys.executable, "-m", "lance_core", *args], cwd=ROOT, check=True)


def photo(path: Path) -> None:
    """A real photo: the astronaut that comes with scikit-image."""
    from skimage import data

    Image.fromarray(data.astronaut()).save(path)


def main() -> None:
    """Write the tiny checkpoint, make two pictures, say where they are and what they are worth."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    photo(OUT / "photo.png")
    lance("tiny", str(OUT / "models"))
    model = ("-m", str(OUT / "models" / "Lance_3B"))
    lance("t2i", "a lighthouse in a storm, oil on canvas", "-o", str(OUT / "t2i.png"), "--width", "512", "--height", "512", *model)
    edit = ("--resolution", "image_512res", "--steps", "12", "-o", str(OUT / "edit.png"))
    lance("image_edit", "make it a watercolour", str(OUT / "photo.png"), *edit, *model)
    lance("x2t_image", "Who is this?", str(OUT / "photo.png"), "--max-new-tokens", "12", "--json", *model)
    print(
        f"\nThe pictures are {OUT / 't2i.png'} and {OUT / 'edit.png'} (the photo: {OUT / 'photo.png'}).\n"
        "They show noise, and the answer is gibberish: this checkpoint's weights are random, made here so that everything can be\n"
        "tried without 25 GB. The real weights are on Hugging Face, bytedance-research/Lance; README.md says where to put them."
    )


if __name__ == "__main__":
    main()
