"""Read a file that lists images and texts: a table, documents, preferences, or annotations."""

from collections.abc import Iterator
from pathlib import Path

from multimodal.data.formats.column_files import COLUMN_SUFFIXES, open_columns
from multimodal.data.tables.annotations import load_json, read_annotations
from multimodal.data.tables.columnar import column_rows, read_columnar
from multimodal.data.tables.columns import find_columns, join_rows
from multimodal.data.tables.documents import is_documents, read_documents
from multimodal.data.tables.preferences import is_preferences, read_preferences
from multimodal.data.tables.records import ReadOptions, SourceItem
from multimodal.data.tables.rows import ROW_SUFFIXES, read_rows, rows_of

TABLE_SUFFIXES = (*ROW_SUFFIXES, *COLUMN_SUFFIXES, ".json")


def read_table(table: Path, options: ReadOptions) -> Iterator[SourceItem]:
    """The samples of a file with a suffix of TABLE_SUFFIXES.

    Raises:
        ValueError: if the file as a whole cannot be read.
    """
    suffix = table.suffix.lower()
    if suffix in COLUMN_SUFFIXES:
        file = open_columns(table)
        if is_preferences(file.schema.names, options):
            rows_of_columns = column_rows(table, file, file.schema.names)
            yield from read_preferences(table, rows_of_columns, options)
        else:
            yield from read_columnar(table, options)
        return
    if suffix == ".json":
        content = load_json(table)
        if isinstance(content, dict):
            yield from read_annotations(table, content, options)
            return
        layout, rows = None, list(rows_of(table, content))
    elif options.image_column is None and is_documents(table, options.text_column):
        yield from read_documents(table, options.images or table.parent, options.text_column)
        return
    else:
        named = [name for name in (options.image_column, options.text_column) if name]
        layout, lazy = read_rows(table, named)
        rows = list(lazy)
    names = layout.names if layout else tuple(dict.fromkeys(n for row in rows for n in row.fields))
    if is_preferences(names, options):
        yield from read_preferences(table, rows, options)
        return
    yield from join_rows(table, rows, find_columns(table, names, options, layout), options)
