"""The joint losses in a plain torch loop: no Lightning, no command line.

python examples/plain_torch.py MODEL SHARDS STEPS
"""

import sys

import torch

from multimodal import load
from multimodal.data.images import fit_image, open_image, to_tensor
from multimodal.data.shards import Shards
from multimodal.model.training_batch import TrainingSample

model = load(sys.argv[1])
shards, steps = Shards(sys.argv[2], "train"), int(sys.argv[3])
builder, network = model.batch_builder(row_length=512), model.network.train()
optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)
tokenizer = model.image_tokenizer

for step in range(steps):
    samples = []
    for number in range(8 * step, 8 * step + 8):
        sample = shards[number % len(shards)]
        image = fit_image(open_image(sample.image), tokenizer.image_size, tokenizer.fit)
        codes = tokenizer.encode(to_tensor(image)[None]).numpy()
        samples.append(TrainingSample(sample.key, sample.record, codes, seed=number))
    loss, parts = network(builder.build(samples))  # captions, answers, drawings, alignment
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in parts.items() if "/" not in k))
