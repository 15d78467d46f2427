"""`story`: a script of shots as pictures, clips and one video, every step kept as a file and done once.

Each option of a shot goes to the commands that have it, by its long name: the picture is drawn by `t2i` or
`subject_image`, the clip by `i2v`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..checks import shown
from ..errors import RequestError
from ..inputs.tasks import TASKS
from .common import Bars
from .script import Shot, read

if TYPE_CHECKING:
    from ..pipeline import Lance

DESCRIPTION = (
    "The script is TOML: [defaults] with any option by its long name, then a [[shot]] each with `prompt` "
    "and any "
    "option; `references = [...]` in either lists pictures of subjects. Every shot becomes NN_prompt.txt, "
    "NN_picture.png and NN_clip.mp4 in DIR, all of them story.mp4. To make a shot anew, delete its files."
)
PICTURE_ONLY = {"best-of"}  # choosing among clips would draw every one of them
OWN = {"prompt", "references", "enhance", "enhance-by"}


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors of the script."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(message)


def run(args: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Do what is missing of a story."""
    script, folder = Path(args.script), Path(args.output)
    defaults, shots = read(script, folder)
    parser, known = _commands()
    for i, shot in enumerate(shots, 1):
        _check(shot, i, parser, known)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{folder} cannot be made ({error.strerror}); name another folder") from None
    maker = Maker(args, defaults, parser, known, bars)
    made = [file for shot in shots for file in maker.make(shot)]
    target = folder / "story.mp4"
    if made or not target.is_file() or _parts_of(target) != [s.file("clip.mp4").name for s in shots]:
        made.append(join(target, shots, args, bars))
    elif not args.json:
        print(f"{target}  (nothing is missing)")
    return {"task": "story", "files": [str(file) for file in made], "story": str(target)}


def _commands() -> tuple[_Parser, dict[str, set[str]]]:
    """The commands of the tasks as a parser, and the long options each has."""
    from . import generate

    parser = _Parser(prog="story", exit_on_error=False)
    commands = parser.add_subparsers(dest="command")
    generate.add_commands(commands)
    known = {
        task: {s[2:] for action in sub._actions for s in action.option_strings if s.startswith("--")}
        for task, sub in commands.choices.items()
    }
    return parser, known


def _check(shot: Shot, number: int, parser: _Parser, known: dict[str, set[str]]) -> None:
    """Refuse an option that no step has, and values that one cannot take, before anything is drawn."""
    picture = picture_task(shot)
    all_known = known[picture] | known["i2v"] | OWN
    for name in shot.options:
        if name not in all_known:
            raise RequestError(f"shot {number} has {shown(name)}, which is no option of {picture} or i2v")
    enhance, writer = shot.options.get("enhance", False), shot.options.get("enhance-by", "auto")
    if not isinstance(enhance, bool) or writer not in ("auto", "model", "endpoint"):
        raise RequestError(
            f"shot {number} has enhance = {shown(enhance)}, enhance-by = {shown(writer)}; expected true "
            f"or false, "
            "and auto, model or endpoint"
        )
    for file in shot.references:
        if not Path(file).is_file():
            raise RequestError(f"the reference {file} of shot {number} does not exist")
    for task, media in ((picture, list(shot.references)), ("i2v", ["picture.png"])):
        try:
            arguments(parser, known, task, shot.prompt, media, shot.options)
        except RequestError as error:
            raise RequestError(f"shot {number}: {error}") from None


def picture_task(shot: Shot) -> str:
    """The command that draws a shot's picture."""
    return "subject_image" if shot.references else "t2i"


def arguments(
    parser: _Parser,
    known: dict[str, set[str]],
    task: str,
    prompt: str,
    media: list[str],
    options: dict[str, Any],
) -> argparse.Namespace:
    """A command's arguments as if its options had been typed.

    Raises:
        RequestError: a value that the command does not take.
    """
    typed = [task]
    for name, value in options.items():
        if name not in known[task] or (task == "i2v" and name in PICTURE_ONLY) or name in OWN:
            continue
        if isinstance(value, bool):
            typed += [f"--{name}"] if value else []
        elif isinstance(value, list) and name == "then":
            typed += [f"--then={one}" for one in value]
        elif isinstance(value, list):
            typed += [f"--{name}", *map(str, value)]
        else:
            typed.append(f"--{name}={value}")
    try:
        return parser.parse_args([*typed, "--", prompt, *media])
    except argparse.ArgumentError as error:
        raise RequestError(str(error)) from None


class Maker:
    """Makes what is missing of a shot; the model is opened when the first thing is."""

    def __init__(
        self,
        args: argparse.Namespace,
        whole: dict[str, Any],
        parser: _Parser,
        known: dict[str, set[str]],
        bars: Bars,
    ) -> None:
        self.args, self.parser, self.known, self.bars = args, parser, known, bars
        for name, value in whole.items():  # the command line is above the script
            name = "model" if name == "checkpoint" else name
            if getattr(args, name) in (None, False) or (name == "dtype" and args.dtype == "bf16"):
                setattr(args, name, value)
        self._lance: Lance | None = None

    @property
    def lance(self) -> Lance:
        """The model."""
        if self._lance is None:
            from .generate import opened

            self._lance = opened(self.args, True, self.bars)
        return self._lance

    def make(self, shot: Shot) -> list[Path]:
        """What of a shot's prompt, picture and clip is missing, or comes after what was; their files."""
        steps = ((self.prompt, "prompt.txt"), (self.picture, "picture.png"), (self.clip, "clip.mp4"))
        made: list[Path] = []
        for step, ending in steps:
            file = shot.file(ending)
            if made or not file.is_file():
                step(shot, file)
                made.append(file)
        return made

    def prompt(self, shot: Shot, file: Path) -> None:
        """The prompt to draw, written out in detail if wanted."""
        from ..inputs.files import replacing

        text = shot.prompt
        if shot.options.get("enhance"):
            task = "subject_video" if shot.references else "t2v"
            by, seed = shot.options.get("enhance-by", "auto"), shot.options.get("seed", 42)
            text = self.lance.enhance(text, task, list(shot.references) or None, by=by, seed=seed)
        with replacing(file) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def picture(self, shot: Shot, file: Path) -> None:
        """The picture its clip starts with."""
        self._draw(shot, picture_task(shot), list(shot.references), file)

    def clip(self, shot: Shot, file: Path) -> None:
        """The clip."""
        self._draw(shot, "i2v", [str(shot.file("picture.png"))], file)

    def _draw(self, shot: Shot, task: str, media: list[str], file: Path) -> None:
        from .generate import generate

        try:
            prompt = shot.file("prompt.txt").read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise RequestError(f"{shot.file('prompt.txt')} cannot be read ({error}); delete it") from None
        asked = arguments(self.parser, self.known, task, prompt, media, shot.options)
        asked.json = self.args.json
        generate(asked, TASKS[task], self.lance, file, self.bars)


def _parts_of(target: Path) -> list[str]:
    """The clips a story's video was joined from."""
    from ..inputs import media

    return list((media.read_metadata(target) or {}).get("shots", ()))


def join(target: Path, shots: list[Shot], args: argparse.Namespace, bars: Bars) -> Path:
    """Write the clips of all shots as one video, of the first one's size."""
    from ..inputs import media, preprocess
    from .saving import save_one

    clips = [shot.file("clip.mp4") for shot in shots]
    tall, wide = media.read_clip(clips[0], pick=lambda total, rate: [0])[0].shape[1:3]

    def frames() -> Iterator[Any]:
        for clip in clips:
            yield from preprocess.resize_frames(media.load_video(clip)[0], (wide, tall))

    counts = [(media.read_metadata(clip) or {}).get("num_frames", 0) for clip in clips]
    seed = (media.read_metadata(clips[0]) or {}).get("seed", 0)
    asked = {"task": "story", "shots": [clip.name for clip in clips], "num_frames": sum(counts), "seed": seed}
    save_one(target, frames(), sum(counts), 12, asked | {"width": wide, "height": tall}, args, bars)
    return target
