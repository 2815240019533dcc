"""Energy of requests, one at a time: captions, answers and drawings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from multimodal.data.samples import Sample
from multimodal.energy import EnergyMeter
from multimodal.eval.evaluator import Example, Subject, Value, is_one_image

MAX_REQUESTS = 8  # of a kind, after one that is not counted
REQUESTS = 1000  # that the scores are of
QUESTION = "what is in the picture?"
TEXT = "a red circle on a white background"


@dataclass
class EnergyUse:
    """Watt hours and CO2 of 1,000 requests of each kind."""

    name: ClassVar[str] = "energy"
    protocol: ClassVar[str] = (
        f"watt hours and grams of CO2 of {REQUESTS:,} requests, from {MAX_REQUESTS} of each kind "
        "(or as many as there are samples), one at a time, after one that is not counted; a batch "
        "or a server needs less a request; the notes say whether energy was measured or estimated"
    )
    examples: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return is_one_image(sample)

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model = subject.model
        images = subject.originals[:MAX_REQUESTS]
        kinds: dict[str, Callable[[int], object]] = {
            "caption": lambda row: model.caption([images[row]]),
            "answer": lambda row: model.answer(images[row], QUESTION),
        }
        if model.image_tokenizer.can_draw:
            kinds["drawing"] = lambda row: model.draw(TEXT, seed=subject.seed + row)
        for kind, request in kinds.items():
            request(0)  # what is loaded and compiled once

            def watt_hours(
                rows: Sequence[int], request: Callable[[int], object] = request
            ) -> list[float]:
                each = []
                for row in rows:
                    with EnergyMeter(model.device, subject.energy) as meter:
                        request(row)
                        each.append(meter.read().watt_hours)
                return each

            each = subject.map_batches(range(len(images)), watt_hours)
            yield f"{kind}_Wh", [REQUESTS * value for value in each]
            grams = subject.energy.grams_per_kwh
            yield f"{kind}_CO2_g", [value * grams for value in each]  # 1,000 x Wh / 1,000
        with EnergyMeter(model.device, subject.energy) as meter:
            self.notes.append(f"{meter.how}; {subject.energy.grams_per_kwh:g} g CO2 a kWh")
