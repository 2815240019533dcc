"""What an operator decides: the name of the model, keys, and limits."""

from dataclasses import dataclass
from typing import Annotated

from multimodal.files import local_path
from multimodal.schemas import Between, check_fields

Count = Annotated[int, Between(1, 2**31)]
Bytes = Annotated[int, Between(0, 2**50)]
Days = Annotated[int, Between(0, 36_500)]
Seconds = Annotated[float, Between(0.1, 86_400)]
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a server.

    Args:
        name: of the model, as clients call it.
        keys: API keys, one of which a client must send. None: everyone may.
        rows: texts and drawings that are decoded together.
        requests: that are worked on or wait. More get status 429.
        prefix_bytes: in which beginnings of prompts are kept, as images. 0: none.
        max_body: bytes of a request.
        max_bytes: of the bodies that are being received, all together. More get status 429.
        max_pixels: of an image in a request.
        max_decoded: bytes of images that are edited, of what they become, and of drawings until
            they are sent, of all requests. More get status 429.
        max_images: in a request.
        max_choices: ``n`` of a request.
        max_inputs: texts and images of a request for embeddings.
        max_tokens: of a text that is written.
        default_tokens: of a text for which a request names none. Fewer, if max_tokens or what the
            model reads leave no room for as many.
        fetch: images may be http and https addresses.
        private: these addresses may be in private networks.
        record: a file in which requests are noted (multimodal/record). Empty: none.
        record_texts: note prompts and replies, not only their digests.
        record_days: after which entries are removed from the record, while the server runs. 0: they
            stay.
        record_text_days: after which texts are taken out of it. 0: they stay as long as entries.
        filters: a folder of rules (multimodal/filters). Empty: none.
        fallback_answer: what is answered where a model failed, is unsure, or is filtered. Empty:
            nothing.
        unsure: a model is unsure if its tokens have a lower log probability on average, in nats.
        drift_reference: an earlier record, with which the last requests are compared.
        peers: a folder in which workers tell one another their metrics. Empty: one process.
        worker: the number of this one.
        local: the server listens at one of LOCAL_HOSTS. Without a key, requests have to name it so.
        body_timeout: seconds in which a request has to arrive.
        write_timeout: seconds after which a client that reads nothing is left.
        stop_timeout: seconds in which requests may end when the server stops.
    """

    name: str = "multimodal"
    keys: tuple[str, ...] = ()
    rows: Count = 32
    requests: Count = 256
    prefix_bytes: Bytes = 256 << 20
    max_body: Count = 32 << 20
    max_bytes: Count = 512 << 20
    max_pixels: Count = 50_000_000
    max_decoded: Bytes = 2 << 30
    max_images: Count = 16
    max_choices: Count = 16
    max_inputs: Count = 2048
    max_tokens: Count = 1024
    default_tokens: Count = 256
    fetch: bool = False
    private: bool = False
    record: str = ""
    record_texts: bool = False
    record_days: Days = 0
    record_text_days: Days = 0
    filters: str = ""
    fallback_answer: str = ""
    unsure: float | None = None
    drift_reference: str = ""
    peers: str = ""
    worker: Annotated[int, Between(0, 1023)] = 0
    local: bool = False
    body_timeout: Seconds = 60.0
    write_timeout: Seconds = 60.0
    stop_timeout: Seconds = 30.0

    def __post_init__(self) -> None:
        check_fields(self)
        for path in (self.record, self.filters, self.drift_reference):
            local_path(path)
        if not self.name.strip() or any(not key.strip() for key in self.keys):
            raise ValueError("the name of the model and API keys must not be empty")
        for name in ("record_days", "record_text_days"):
            if getattr(self, name) and not self.record:
                raise ValueError(f"{name}: give record, or nothing is noted")
        if self.drift_reference and not self.record:
            raise ValueError(
                "drift_reference: requests are compared as they are recorded: give record"
            )
