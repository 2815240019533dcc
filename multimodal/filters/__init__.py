"""Rules about texts and images that go into a model and come out of it."""
