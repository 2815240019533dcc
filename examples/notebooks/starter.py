# %% [markdown]
# # The starter in ten cells
#
# A file in percent format: open it in VS Code, PyCharm or Spyder and run it cell by cell, or run it
# whole (`python examples/notebooks/starter.py`). `jupytext --to ipynb starter.py` makes a notebook.
#
# Nothing is downloaded: the starter is in the package, and the photos are in scikit-image's wheel.

# %% 1. Two pictures: a photo, and a scene of coloured shapes that is rendered here
import random

from multimodal.eval.demo import photo
from multimodal.scenes.rendering import render
from multimodal.scenes.scene import sample_scene

cat, scene = photo("chelsea"), render(sample_scene(random.Random(5)), size=256)
cat.save("cat.png")
scene.save("scene.png")

# %% 2. The starter. Its weights are for non-commercial research only
import multimodal

model = multimodal.load("starter")
print(model)

# %% 3. Captions: of one picture, and of several. What cannot be read is named, not fatal
print(model.caption("cat.png"))
captions = model.caption([cat, scene, "missing.png"], on_error="skip")
print(list(captions), captions.skipped)

# %% 4. The most likely caption of a beam search, and three sampled ones
print(model.caption(cat, beams=5))
print([model.caption(cat, temperature=0.8, seed=seed) for seed in range(3)])

# %% 5. Answers: in the model's own words, or the most likely of some choices
print(model.answer(scene, "what is the colour of the background?"))
print(model.answer(cat, "what is in the picture?", choices=["a cat", "a dog", "a bus"]))

# %% 6. Drawings. Those of several texts come as rows, and a notebook shows them as a grid
drawings = model.draw(["a red circle and a blue square", "a green star"], n=4, seed=1)
drawings[0].grid().save("drawings.png")

# %% 7. A part of a picture drawn anew: left, top, right and bottom of a box
edited = model.edit(scene, (0, 0, 128, 128), "a yellow ring", seed=2)
edited.save("edited.png")

# %% 8. Pictures and texts in one space: the product of two rows says how well they fit
pictures = model.embed(images=[cat, scene])
texts = model.embed(texts=["a cat looks into the camera", "two shapes on a white background"])
print((pictures @ texts.T).round(decimals=2))

# %% 9. Search: the pictures of a folder that fit a text best
for path, score in model.search("a green star", ".", k=3):
    print(f"{score:.2f}  {path}")

# %% 10. Any mix of texts and pictures in, texts or pictures out, piece by piece
for piece in model.stream([cat, "a cat with"], max_tokens=8):
    print(piece, end="", flush=True)
print()
