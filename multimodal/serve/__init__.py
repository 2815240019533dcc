"""A model behind HTTP, in the shape of OpenAI's API (the extra ``serve``)."""
