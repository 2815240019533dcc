"""The joint training as a LightningModule in a Trainer of your own, without our command line.

python examples/plain_lightning.py MODEL SHARDS STEPS OUT
"""

import sys

import lightning as L

from multimodal.train.data import ShardData
from multimodal.train.joint import JointModule

model, shards, steps, out = sys.argv[1:]
module = JointModule(text_tokenizer=model, image_tokenizer=model, size="tiny", row_length=512)
data = ShardData([shards], global_batch_size=8, workers=0)
trainer = L.Trainer(
    max_steps=int(steps),
    accelerator="auto",
    logger=False,
    enable_checkpointing=False,
    limit_val_batches=0,
    use_distributed_sampler=False,  # the data say which samples each rank has
)
trainer.fit(module, data)
module.model.save(out)
