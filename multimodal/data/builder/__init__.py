"""From what people have (folders, tables, annotations, other shards) to verified shards."""
