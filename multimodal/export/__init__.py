"""A model carried to other engines: stock folders, GGUF files, smaller model folders."""
