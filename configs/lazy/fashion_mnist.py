"""The job of configs/fashion_mnist.yaml as a LazyConfig.

For tools/lazyconfig_train_net.py, and for tools/train_net.py as well.
"""

from fvcore.common.param_scheduler import CosineParamScheduler

from trainkit.config import LazyCall as L
from trainkit.solver import WarmupParamScheduler

from ..common import optim
from ..common.data import dataloader
from ..common.model import model
from ..common.train import train

train.checkpointer.max_to_keep = 3
train.eval_period = 200
train.best_metric = "classification/top1"

model.num_classes = 10
dataloader.train.total_batch_size = 64

optimizer = optim.SGD
optimizer.lr = 0.3
optimizer.nesterov = True
optimizer.weight_decay = 5e-4
optimizer.params.weight_decay_bias = 0.0

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_factor=0.001,
    warmup_length=0.1,
)
