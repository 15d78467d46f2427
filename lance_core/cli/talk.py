"""Commands that talk: `chat`, a conversation in the terminal, and `score`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LanceError, RequestError
from ..inputs.sizes import PRESETS
from . import options
from .common import Bars, check_target, model_options, output_options
from .generate import opened

if TYPE_CHECKING:
    from ..dialogue.conversation import Conversation
    from ..pipeline import Lance

HELP = """\
/image FILE   show a picture or clip with the next question; several in order
/save FILE    write the conversation: .json can be loaded again, anything else is text
/load FILE    go on with a conversation saved as .json
/new          forget what was said
/quit         end (so does the end of the input)"""
MAX_SAVED = 1 << 24  # bytes of a saved conversation


def add_commands(commands: Any) -> None:
    """The two."""
    text = "a conversation in the terminal, about pictures and clips or about anything"
    chat = commands.add_parser(
        "chat", help=text, description=f"{text.capitalize()}. In it: {HELP}", formatter_class=_Lines
    )
    model_options(chat)
    output_options(chat)
    text = "a picture or clip for the first question; repeatable"
    chat.add_argument("--image", action="append", default=[], metavar="FILE", help=text)
    chat.add_argument("--history", metavar="FILE", help="go on with a conversation saved as .json")
    _understanding_options(chat)
    options.add_text_options(chat)
    options.add_clip_options(chat)
    chat.set_defaults(run=run_chat)

    text = "how well pictures and clips fit a text, 0 to 1, the best first"
    score = commands.add_parser("score", help=text, description=f"{text.capitalize()}.")
    model_options(score)
    output_options(score)
    score.add_argument("text", help="what should be seen")
    score.add_argument("images", nargs="+", metavar="FILE", help="pictures and clips")
    _understanding_options(score)
    text = "a question with {text} in it, instead of VQAScore's"
    score.add_argument("--question", help=text)
    score.add_argument("--answer", default="Yes", help="whose probability is given; default: %(default)s")
    options.add_position_options(score)
    score.set_defaults(run=run_score)


def _understanding_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--system-prompt", help="instead of the instruction the weights were trained with")
    text = "default: image_768res for pictures, video_480p for clips"
    sub.add_argument("--resolution", choices=PRESETS, help=text)


class _Lines(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the commands."""


def run_score(args: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Score files."""
    from ..inputs import media

    clips = any(media.is_moving(file) for file in args.images)
    names = ("question", "answer", "resolution", "system_prompt", "positions")
    lance = opened(args, clips, bars)
    values = lance.score(args.images, args.text, **{name: getattr(args, name) for name in names})
    found = sorted(zip(values, args.images, strict=True), key=lambda pair: -pair[0])
    if not args.json:
        bars.close()
        for value, file in found:
            print(f"{value:.4f}  {file}")
    return {"text": args.text, "scores": [{"file": str(f), "score": v} for v, f in found]}


def run_chat(args: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Talk until the input ends."""
    if args.model is None and not Path("models/lance/Lance_3B_Video").exists():
        lance = opened(args, False, bars)
    else:
        lance = opened(args, True, bars)
    talk = Talk(args, lance, bars)
    if args.history:
        talk.load(args.history)
    live = sys.stdin.isatty()
    with contextlib.suppress(AttributeError, ValueError):  # no real file
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    if live and not args.json:
        print("Type a question; /help lists what else there is.")
    while True:
        if live:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() in ("/quit", "/exit"):
            break
        try:
            talk.take(line.strip())
        except LanceError as error:
            bars.close()
            print(f"error: {error}", file=sys.stderr, flush=True)
            talk.failed += 1
            if not live and args.json:
                raise
    return {"task": "chat", "turns": _plain(talk.history), "errors": talk.failed}


class Talk:
    """One conversation: what was said, and what the next question shows."""

    def __init__(self, args: argparse.Namespace, lance: Lance, bars: Bars) -> None:
        self.args, self.lance, self.bars = args, lance, bars
        self.history: Conversation | list[dict[str, Any]] | None = None
        self.shown: list[str] = list(args.image)
        self.failed = 0

    def take(self, line: str) -> None:
        """One line of input."""
        if not line:
            return
        if not line.startswith("/"):
            self.ask(line)
            return
        command, _, rest = line.partition(" ")
        rest = rest.strip().strip("'\"")
        if command == "/help":
            self.say(HELP)
        elif command == "/new":
            self.history, self.shown = None, []
        elif command in ("/image", "/save", "/load"):
            if not rest:
                raise RequestError(f"{command} needs a file: {command} FILE")
            {"/image": self.show, "/save": self.save, "/load": self.load}[command](rest)
        else:
            raise RequestError(f"{command[:40]} is no command; /help lists them")

    def say(self, text: str) -> None:
        """Print, unless only JSON is wanted."""
        if not self.args.json:
            self.bars.close()
            print(text, flush=True)

    def show(self, file: str) -> None:
        """A picture or clip for the next question."""
        from ..inputs import media

        media.is_moving(file)  # whether it can be read at all
        self.shown.append(file)

    def ask(self, question: str) -> None:
        """Answer, a piece at a time."""

        def piece(text: str) -> None:
            if not self.args.json:
                self.bars.close()
                print(text, end="", flush=True)

        names = (*options.ANSWERING, *options.CLIP, "frames")
        chosen = {name: getattr(self.args, name) for name in names}
        answer = self.lance.understand(
            question, images=self.shown or None, history=self.history, on_token=piece, **chosen
        )
        self.history, self.shown = answer.history, []
        self.say("")

    def save(self, file: str) -> None:
        """Write the conversation."""
        from ..inputs.files import replacing

        turns = _plain(self.history)
        if file.lower().endswith(".json"):
            text = json.dumps(turns, ensure_ascii=False, indent=1) + "\n"
        else:
            text = "\n\n".join(_written(turn) for turn in turns) + "\n"
        with replacing(check_target(file)) as temporary:
            temporary.write_text(text, encoding="utf-8")
        self.say(f"{file}  ({len(turns)} turns)")

    def load(self, file: str) -> None:
        """Go on with a saved conversation; its pictures are read when the next question is asked."""
        try:
            with open(file, "rb") as stream:
                turns = json.loads(stream.read(MAX_SAVED))
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or "it is no JSON"
            raise RequestError(
                f"{file} cannot be read ({reason}); expected what /save wrote as .json"
            ) from None
        from ..dialogue.history import turns_of

        if not isinstance(turns, list):
            raise RequestError(f"{file} is no conversation; expected what /save wrote as .json")
        turns_of(turns)
        self.history = turns


def _plain(history: Conversation | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    if history is None:
        return []
    return history if isinstance(history, list) else history.to_json()


def _written(turn: dict[str, Any]) -> str:
    files = "".join(f"[{file}]\n" for file in turn.get("images", ()))
    return f"{files}> {turn['question']}\n{turn['answer']}"
