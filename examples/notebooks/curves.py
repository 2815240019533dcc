# %% [markdown]
# # Loss curves of a run
#
# Every run writes `logs/metrics.csv`: a line for each logged step and each validation. `RUN` is the
# run of `own_data.py`; any other folder of a run does as well. TensorBoard shows the same
# (`tensorboard --logdir runs`). What is normal: docs/training.md.
# Needs `pip install 'multimodal[notebooks]'`.

# %% The log
import csv
from pathlib import Path

import matplotlib.pyplot as plt

RUN = Path("runs/flags")
with open(RUN / "logs" / "metrics.csv", encoding="utf-8", newline="") as file:
    lines = list(csv.DictReader(file))


def curve(name: str) -> tuple[list[int], list[float]]:
    """Steps, and the values of a column there. A line has only what was logged at its time."""
    found = [(int(line["step"]), float(line[name])) for line in lines if line.get(name)]
    return [step for step, _ in found], [value for _, value in found]


# %% The losses of a step in nats a token, and the same on what was held out
losses = [
    name for name in ("caption", "answer", "text", "image", "reconstruct", "alignment", "total")
    if curve(f"train/{name}")[0]
]  # fmt: skip
figure, axes = plt.subplots(2, 4, figsize=(11, 5))
for axis in axes.flat:
    axis.axis("off")
for name, axis in zip(losses, axes.flat, strict=False):
    axis.axis("on")
    axis.plot(*curve(f"train/{name}"), linewidth=1, label="training")
    axis.plot(*curve(f"val/{name}"), "o-", markersize=4, label="held out")
    axis.set_title(name, fontsize=9)
axes[0, 0].legend(fontsize=8)
figure.supxlabel("step")
figure.tight_layout()
figure.savefig("losses.png", dpi=120, bbox_inches="tight")
plt.show()

# %% Which objective pulls how strongly: the gradient norms of their losses
pulls = sorted({name for line in lines for name in line if name.startswith("train/grad_norm/")})
figure, axis = plt.subplots(figsize=(6, 3))
for name in pulls:
    axis.plot(*curve(name), linewidth=1, label=name.removeprefix("train/grad_norm/"))
axis.set(xlabel="step", title="gradient norms", yscale="log")
axis.legend(fontsize=8)
figure.savefig("gradients.png", dpi=120, bbox_inches="tight")
plt.show()
