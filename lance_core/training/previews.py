"""Samples of what is being learnt: pictures, clips and answers, made by the experts in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..components import Components
from ..inputs import media
from ..pipeline import Lance
from .passes import Experts
from .rows import Row, is_video, source_of
from .settings import Settings

NEW_TOKENS = 64


def save(
    components: Components,
    experts: Experts,
    folder: Path,
    step: int,
    row: Row,
    settings: Settings,
) -> list[Path]:
    """Run each sample prompt with the experts as they are, and save what comes, with the step in its name.

    row: whose task is run, and whose source or first frame an edit or a clip starts from, and about
    whose media a question is asked.

    Raises:
        LanceError: as `Lance.generate` and `Lance.understand`.
    """
    resolution = settings.resolution
    folder.mkdir(parents=True, exist_ok=True)
    components.use("und", experts.und)
    if experts.gen is not None:
        components.use("gen", experts.gen)
    lance, made = Lance(components), []
    try:
        for number, prompt in enumerate(settings.sample_prompts):
            path = folder / f"step-{step:06d}-{number}"
            if row.answer:
                video, source = is_video(row.media), source_of(row.media)
                answer = lance.understand(
                    prompt,
                    image=None if video else source,
                    video=source if video else None,
                    system_prompt=row.system,
                    resolution=resolution,
                    max_new_tokens=NEW_TOKENS,
                )
                made.append(path.with_suffix(".txt"))
                made[-1].write_text(answer.text, encoding="utf-8")
                continue
            frames = settings.num_frames if row.task in ("t2v", "i2v", "subject_video") else None
            result = lance.generate(
                row.task,
                prompt,
                **_taken(row),
                num_frames=frames,
                resolution=resolution,
                steps=settings.sample_steps,
                seed=settings.seed,
            )
            if row.kind.output == "video":
                made.append(path.with_suffix(".mp4"))
                media.save_video(made[-1], result.frames, result.fps, result.request)
            else:
                made.append(path.with_suffix(".png"))
                media.save_image(made[-1], result.frames[0], result.request)
    finally:
        components.unload()
    return made


def _taken(row: Row) -> dict[str, Any]:
    """The media a task takes, of a row."""
    if row.task == "i2v":
        return {"image": media.read_clip(source_of(row.media))[0][0]}
    if row.kind.takes == "references":
        return {"references": [source_of(r) for r in row.sources]}
    return {row.kind.takes: source_of(row.sources[0])} if row.kind.takes else {}
