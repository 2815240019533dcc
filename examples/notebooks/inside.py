# %% [markdown]
# # Looking inside
#
# What a picture is to the model (codes), where the model looks while it writes (attention), and how
# it arranges pictures and texts (embeddings). Needs `pip install 'multimodal[notebooks]'`.

# %% The model, and a photo
import random

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

import multimodal
from multimodal.eval.demo import photo
from multimodal.scenes.rendering import render
from multimodal.scenes.scene import sample_scene

PICTURES = 400  # of the last cells
model = multimodal.load("starter")
picture = photo("astronaut")
layout = model.config.layout

# %% [markdown]
# ## Codes
#
# An image is a few hundred numbers. Similar codes get similar colours here: the first three
# principal components of the vectors that the codes stand for. The last picture is what the codes
# keep: they are decoded again.

# %%
codes = model.encode_images(picture)
tables = model.image_tokenizer.code_vectors()  # of each group of each level
panels = [("the picture", picture)]
for level in layout.levels:
    grid = layout.unflatten(level.name, codes[None])[0].numpy()
    for group in range(level.groups):
        colours = PCA(3, whiten=True).fit_transform(next(tables).numpy())
        rgb = (0.5 + colours[grid[:, :, group]] / 4).clip(0, 1)
        name = f"{level.name} {group + 1}" if level.groups > 1 else level.name
        panels.append((f"{name}: {level.grid} x {level.grid} of {level.codebook_size}", rgb))
if model.image_tokenizer.can_draw:
    panels.append(("decoded", model.decode_images(codes)))

figure, axes = plt.subplots(1, len(panels), figsize=(2.6 * len(panels), 3), squeeze=False)
for axis, (title, image) in zip(axes[0], panels, strict=True):
    axis.imshow(image, extent=(0, 1, 0, 1))
    axis.set_title(title, fontsize=9)
    axis.axis("off")
figure.savefig("codes.png", dpi=120, bbox_inches="tight")
plt.show()

# %% [markdown]
# ## Attention
#
# The weights of each word of the caption on the places of the image, the mean over layers and
# heads. Weights say where information is taken from. They do not prove what caused a word.

# %%
maps = model.attention(picture)
on_image = maps.on_image().mean((0, 1)).numpy()  # [T, h, w]
shown = range(min(len(maps.tokens), 8))
figure, axes = plt.subplots(2, 4, figsize=(9, 5))
for axis in axes.flat:
    axis.axis("off")
for number, axis in zip(shown, axes.flat, strict=False):
    strength = on_image[number] / on_image[number].max()
    axis.imshow(picture.convert("L"), cmap="gray", extent=(0, 1, 0, 1))
    axis.imshow(on_image[number], cmap="autumn", alpha=0.8 * strength, extent=(0, 1, 0, 1))
    share = float(on_image[number].sum())
    axis.set_title(f"{maps.tokens[number].strip()!r}: {share:.0%} on the image", fontsize=9)
figure.savefig("attention.png", dpi=120, bbox_inches="tight")
plt.show()

# %% Which heads look at the image at all: a row for each layer
share = maps.on_image().sum((-2, -1)).mean(2).numpy()
figure, axis = plt.subplots(figsize=(4, 3))
bar = axis.imshow(share, vmin=0, vmax=1, cmap="viridis")
axis.set(xlabel="head", ylabel="layer", title="weight on the image")
axis.set(xticks=range(share.shape[1]), yticks=range(share.shape[0]))
figure.colorbar(bar)
figure.savefig("heads.png", dpi=120, bbox_inches="tight")
plt.show()

# %% [markdown]
# ## Embeddings
#
# Scenes with one object, as points. PCA keeps distances as well as a plane can. t-SNE keeps
# neighbours, and its distances between groups mean nothing.

# %%
rng, scenes = random.Random(0), []
while len(scenes) < PICTURES:
    scene = sample_scene(rng)
    if len(scene.objects) == 1 and scene.background in ("white", "cream"):
        scenes.append(scene)
rows = model.embed(images=[render(scene) for scene in scenes]).numpy()
planes = {
    "PCA": PCA(2).fit_transform(rows),
    "t-SNE": TSNE(2, perplexity=min(30, PICTURES / 4), random_state=0).fit_transform(rows),
}

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 4.2))
markers = dict(zip(sorted({s.objects[0].shape for s in scenes}), "oshX*PDv^<>p", strict=False))
names = {"grey": "0.6", "cream": "wheat"}
for axis, (title, points) in zip(axes, planes.items(), strict=True):
    for (x, y), scene in zip(points, scenes, strict=True):
        item = scene.objects[0]
        colour = names.get(item.colour, item.colour)
        axis.plot(x, y, markers[item.shape], color=colour, markersize=5, alpha=0.8)
    axis.set(title=f"{title}: colours and shapes of the objects", xticks=[], yticks=[])
figure.savefig("embeddings.png", dpi=120, bbox_inches="tight")
plt.show()

# %% How well the planes keep what the embeddings know: is the nearest other scene of the colour?
colours = np.array([scene.objects[0].colour for scene in scenes])
agreement = {}
for title, points in {"all dimensions": rows, **planes}.items():
    distances = torch.cdist(torch.tensor(points), torch.tensor(points)).fill_diagonal_(torch.inf)
    nearest = distances.argmin(1).numpy()
    agreement[title] = float((colours == colours[nearest]).mean())
print(agreement)
