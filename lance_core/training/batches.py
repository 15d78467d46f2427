"""Which rows a step trains on, and which are held out: samples with their draws."""

from __future__ import annotations

import json

import torch

from ..inputs.tokenizer import Tokenizer
from . import draws
from .encoding import Encoder, sample_of
from .learner import Item
from .rows import Row
from .settings import Settings

HELD_OUT, MOST_HELD, LEAST_TO_HOLD = 0.1, 16, 10


class Batches:
    """A data set cut into steps.

    measured: numbers of the rows that validation is run on; held: those of them that are not trained on. With
    fewer than 10 rows none is held out by default, and the validation loss is that of trained rows.
    """

    def __init__(self, rows: list[Row], encoder: Encoder, tokenizer: Tokenizer, settings: Settings) -> None:
        self.rows, self.encoder, self.tokenizer, self.settings = rows, encoder, tokenizer, settings
        count, wanted = len(rows), settings.validation
        if wanted is None:
            wanted = min(max(1, count * HELD_OUT), MOST_HELD) if count >= LEAST_TO_HOLD else 0
        held = min(int(wanted * count if 0 < wanted < 1 else wanted), count - 1)
        order = torch.randperm(count, generator=draws.generator("held out", settings.seed)).tolist()
        self.held = sorted(order[:held])
        self.measured = self.held or sorted(order[:MOST_HELD])
        trained = [i for i in range(count) if i not in set(self.held)]
        self.numbers = [i for i in trained for _ in range(rows[i].repeats)]

    def names(self, step: int) -> list[str]:
        """The rows of a step, from 0."""
        return [self._row(step, place).name for place in range(self.settings.batch)]

    def items(self, step: int, rank: int = 0, world: int = 1) -> list[Item]:
        """A rank's share of a step."""
        s = self.settings
        return [
            self._item(
                self._row(step, place),
                draws.of_sample(s.seed, step, place, s.caption_dropout, s.reference_dropout),
            )
            for place in range(rank, s.batch, world)
        ]

    def validation(self, rank: int = 0, world: int = 1) -> list[Item]:
        """A rank's share of what is measured, at fixed noise and times."""
        turns = [
            (i, turn)
            for i in self.measured
            for turn in range(1 if self.rows[i].answer else draws.VALIDATION_TIMES)
        ]
        return [
            self._item(self.rows[i], draws.of_validation(self.settings.seed, i, turn))
            for i, turn in turns[rank::world]
        ]

    def fingerprint(self) -> str:
        """What changes when a row's text or media do."""
        told = [
            (r.name, r.task, r.text, r.answer, r.system, r.repeats, self.encoder.fingerprint(r))
            for r in self.rows
        ]
        return draws.hashed(json.dumps(told))

    def _row(self, step: int, place: int) -> Row:
        s = self.settings
        return self.rows[draws.row_at(self.numbers, s.seed, step * s.batch + place)]

    def _item(self, row: Row, drawn: draws.Drawn) -> Item:
        edit = row.kind.system in ("edit", "subject")
        sample = sample_of(
            row,
            self.encoder.material(row),
            self.tokenizer,
            drop_caption=drawn.drop_caption and not row.answer,
            drop_references=drawn.drop_references and edit,
            as_released=self.settings.as_released,
        )
        if sample.latent is None:
            return Item(row.name, sample, None, None)
        return Item(row.name, sample, drawn.noise_for(sample.latent), drawn.time)
