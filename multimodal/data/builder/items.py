"""Read a source that is no file: a torch Dataset, any Python iterable, a data set of the Hub.

An item is ``(image, texts)``, or a mapping with the names that columns of a table have. Images may
be paths, bytes, Pillow images, numpy arrays and torch tensors. Pixels are stored as PNG.
"""

import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeGuard, runtime_checkable

from PIL import Image

from multimodal.data.formats.arrays import image_of_array
from multimodal.data.formats.column_files import name_classes
from multimodal.data.images import open_image
from multimodal.data.tables.columns import TEXT_COLUMNS, Columns, find_columns
from multimodal.data.tables.preferences import NoPreference, is_preferences, preference_of
from multimodal.data.tables.records import (
    Blob,
    ImagePlace,
    ReadOptions,
    RejectedSample,
    SourceItem,
    SourceSample,
    held_out,
    image_in,
    shuffled,
)
from multimodal.data.tables.rows import IMAGE_COLUMNS
from multimodal.files import MAX_FILE, UnreadableText
from multimodal.hub.address import HubName
from multimodal.terminal import one_line, shown

DATASETS_EXTRA = "pip install 'multimodal[datasets]'"
_PLAIN = (type(None), bool, int, float, str, list, tuple, dict, Decimal)


@runtime_checkable
class Numbered(Protocol):
    """Items by their numbers: a list, a torch Dataset, a Dataset of Hugging Face."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Any: ...


Items: TypeAlias = Iterable[Any] | Numbered


def _has_numbers(items: Items) -> TypeGuard[Numbered]:
    # An IterableDataset of torch inherits a __getitem__ that raises an error.
    torch_data: Any = sys.modules.get("torch.utils.data")
    by_order = torch_data is not None and isinstance(items, torch_data.IterableDataset)
    return isinstance(items, Numbered) and not by_order


@dataclass(frozen=True, eq=False)
class ItemSource:
    """Items of a program, by splits. ``name``: what messages and the manifest call it."""

    name: str
    splits: Mapping[str, Items]

    def __str__(self) -> str:
        return self.name

    @property
    def count(self) -> int | None:
        """The number of items, if it is known."""
        known = [len(items) for items in self.splits.values() if _has_numbers(items)]
        return sum(known) if len(known) == len(self.splits) else None


def source_of_items(items: Any) -> ItemSource:
    """A source of what ``build_shards`` is given.

    Args:
        items: a torch Dataset, a list, or anything else that is iterable; or a mapping of these,
            by the names of splits.

    Raises:
        ValueError: for anything else.
    """
    name = f"{type(items).__module__}.{type(items).__qualname__}".removeprefix("builtins.")
    splits = dict(items) if isinstance(items, Mapping) else {"": items}
    for split, each in splits.items():
        if isinstance(each, str | bytes) or not isinstance(each, Iterable | Numbered):
            raise ValueError(
                f"{type(each).__name__} is no source: expected a path, an address, a Dataset or "
                f"another iterable of (image, texts){f', in the split {split}' * bool(split)}"
            )
    return ItemSource(name, {str(split): each for split, each in splits.items()})


def source_of_hub(address: str) -> ItemSource | None:
    """A data set of the Hugging Face Hub, which is read as a stream. None: it is another address.

    Raises:
        ValueError: without the extra ``datasets``, or if the Hub does not give it.
    """
    parsed = HubName.parse_dataset(address)
    if parsed is None:
        return None
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{address}: to read it, install Hugging Face's datasets: {DATASETS_EXTRA}"
        ) from error
    name, subset = parsed
    try:
        splits = datasets.load_dataset(
            name.repository, subset, revision=name.revision, streaming=True
        )
    except Exception as error:  # of the network, of the Hub, of its files: each has its own
        reason = one_line(str(error)) or type(error).__name__
        hint = f" (name one: hf://datasets/{name.repository}/SUBSET)" * ("onfig name" in reason)
        raise ValueError(f"{address}: the Hub does not give it: {reason:.500}{hint}") from error
    return ItemSource(address, dict(splits))


def read_items(source: ItemSource, options: ReadOptions) -> Iterator[SourceItem]:
    """The samples of a source. Items with numbers are shuffled, others keep their order.

    Raises:
        ValueError: if an iterator fails. It cannot go on, and what follows must not be lost unseen.
    """
    for split, items in source.splits.items():
        items, classes = _prepared(items)
        reader = _Reader(split, classes, options)
        if _has_numbers(items):
            for number in map(int, shuffled([str(number) for number in range(len(items))])):
                try:
                    item = items[number]
                except Exception as error:  # that of a Dataset's own code
                    yield reader.rejected(number, "unreadable item", _described(error))
                else:
                    yield reader.read(number, item)
            continue
        iterator, number = iter(items), 0
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                break
            except Exception as error:
                raise ValueError(
                    f"{source}: {reader.name(number)} could not be read ({_described(error)}), and "
                    "an iterator does not go on after an error. Give a Dataset with __len__ and "
                    "__getitem__ to leave such items out"
                ) from error
            yield reader.read(number, item)
            number += 1


def _described(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")


def _prepared(items: Any) -> tuple[Any, Mapping[str, Sequence[str]]]:
    """Items that give image files as they are, if they can, and the names of classes by column.

    For ``(image, number)`` the names are those of the attribute ``classes``, as torchvision has it.
    """
    library = sys.modules.get("datasets")  # who has such an object has imported it
    hub_types = () if library is None else (library.Dataset, library.IterableDataset)
    if library is None or not isinstance(items, hub_types):
        inner = items
        while not hasattr(inner, "classes") and hasattr(inner, "dataset"):  # of a torch Subset
            inner = inner.dataset
        classes = getattr(inner, "classes", None)
        named = isinstance(classes, list | tuple) and all(isinstance(c, str) for c in classes)
        return items, {"label": classes} if named and classes else {}
    names = {}
    for column, feature in (items.features or {}).items():
        if isinstance(feature, library.Image):
            items = items.cast_column(column, library.Image(decode=False))
        elif isinstance(feature, library.ClassLabel):
            names[column] = feature.names
    return items.with_format(None), names


@dataclass(frozen=True)
class _Reader:
    """Makes samples of the items of a split. classes: the names of classes by column."""

    split: str
    classes: Mapping[str, Sequence[str]]
    options: ReadOptions

    def name(self, number: int) -> str:
        return f"{shown(self.split)}: item {number}" if self.split else f"item {number}"

    def rejected(self, number: int, reason: str, detail: str) -> RejectedSample:
        return RejectedSample(self.name(number), reason, detail)

    def read(self, number: int, item: Any) -> SourceItem:
        name = self.name(number)
        if isinstance(item, Mapping) and is_preferences(item, self.options):
            return self._preference(number, item)
        try:
            fields, columns = self._fields(item)
            place, hint = _image(fields.pop(columns.image, None), name, self.options)
        except ValueError as error:
            detail = shown(str(error).removeprefix(f"{name}: "))
            return self.rejected(number, "no image", detail)
        fields = name_classes(
            {key: value for key, value in fields.items() if self._keeps(key, value)},
            self.classes,
        )
        try:
            record = columns.record(fields, self.options.notes.of(name))
        except UnreadableText as error:
            return self.rejected(number, "unreadable text", str(error))
        above = f"{self.split}-" if self.split else ""
        return SourceSample(
            name=name,
            hint=shown(hint or f"{above}{number:08d}"),
            identity=shown(f"{self.split}/{number}"),
            images=(place,),
            record=record,
            split=held_out(self.split),
        )

    def _preference(self, number: int, item: Mapping[str, Any]) -> SourceItem:
        name = self.name(number)

        def place_of(value: Any) -> ImagePlace:
            try:
                return _image(value, name, self.options)[0]
            except ValueError as error:
                reason = shown(str(error).removeprefix(f"{name}: "))
                raise NoPreference("no image", reason) from error

        try:
            fields = {str(key): _native(value) for key, value in item.items()}
            images, record, document = preference_of(
                fields, place_of, self.options.notes.of(name), self.options.image_column
            )
        except NoPreference as error:
            return self.rejected(number, error.reason, error.detail)
        return SourceSample(
            name=name,
            hint=shown(f"{self.split}-" * bool(self.split) + f"{number:08d}"),
            identity=shown(f"{self.split}/{number}"),
            images=images,
            record={key: value for key, value in record.items() if self._keeps(key, value)},
            split=held_out(self.split),
            document=document,
        )

    def _fields(self, item: Any) -> tuple[dict[str, Any], Columns]:
        """The fields of an item, and which of them are the image and the text."""
        names = self.options
        if not isinstance(item, Mapping):
            if not isinstance(item, list | tuple) or len(item) != 2:
                size = f" of {len(item)}" if isinstance(item, list | tuple) else ""
                raise ValueError(
                    f"a {type(item).__name__}{size}; expected (image, texts), or a mapping"
                )
            image, texts = item
            item = {IMAGE_COLUMNS[0]: image, **_texts(_native(texts))}
            names = ReadOptions(need_text=False)
        fields = {str(key): _native(value) for key, value in item.items()}
        return fields, find_columns(Path("the item"), list(fields), names)

    def _keeps(self, key: str, value: Any) -> bool:
        """Whether a record can hold a field. Others are counted."""
        if isinstance(value, _PLAIN) or hasattr(value, "isoformat"):
            return True
        self.options.notes.ignored[f"fields {key} ({type(value).__name__})"] += 1
        return False


def _texts(texts: Any) -> dict[str, Any]:
    """The fields that the second of a pair stands for."""
    if isinstance(texts, Mapping):
        return dict(texts)
    if isinstance(texts, int) and not isinstance(texts, bool):
        return {"label": texts}
    return {TEXT_COLUMNS[0]: list(texts) if isinstance(texts, tuple) else texts}


def _native(value: Any) -> Any:
    """Numbers and lists of Python, in place of small arrays and tensors."""
    if hasattr(value, "tolist") and getattr(value, "ndim", 9) < 2:
        return value.tolist()
    return value


def _image(value: Any, name: str, options: ReadOptions) -> tuple[ImagePlace, str]:
    """Where the image of an item is, and the key that its file name asks for, if it has one.

    Raises:
        ValueError: if it is no image.
    """
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, Image.Image):
        return _png(open_image(value, name=name)), ""
    if hasattr(value, "ndim"):
        return _png(image_of_array(value, name)), ""
    if isinstance(value, bytearray | memoryview):
        value = bytes(value)
    elif isinstance(value, Path):
        value = str(value)
    path = value.get("path") if isinstance(value, dict) else None
    found = image_in(value)
    if isinstance(found, bytes):
        return Blob(found), Path(path).stem if isinstance(path, str) else ""
    if "://" in found:
        return Blob(_fetched(found)), Path(found).stem
    return (options.images or Path()) / found, Path(found).stem


def _png(image: Image.Image) -> Blob:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Blob(buffer.getvalue())


def _fetched(address: str) -> bytes:
    """An image that lies beside a data set of the Hub, alone or in a zip. No other address."""
    if not address.rpartition("::")[2].startswith("hf://datasets/"):
        raise ValueError(f"{address} is an address; download the images first")
    import fsspec

    try:
        with fsspec.open(address, "rb") as file:
            data: bytes = file.read(MAX_FILE + 1)
    except Exception as error:  # each file system has its own
        raise ValueError(f"{address} could not be fetched ({_described(error)})") from error
    if len(data) > MAX_FILE:
        raise ValueError(f"{address}: over the limit of {MAX_FILE:,} bytes")
    return data
