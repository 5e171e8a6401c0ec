"""What two ranks come to with hooks that look at data of their own on each rank."""

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.engine.hooks.normed_run import NormedNet, loader, samples
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.early_stopping import EarlyStopping
from trainkit.engine.hooks.precise_bn import PreciseBN
from trainkit.engine.hooks.validation_loss import ValidationLoss
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.utils import comm


def make_trainer() -> tuple[SimpleTrainer, NormedNet]:
    torch.manual_seed(3)
    model = NormedNet()
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data_loader = loader(seed=1 + comm.get_rank())
    return SimpleTrainer(wrapped, data_loader, optimizer, gather_metric_period=4), model


def precise_bn() -> dict[str, Any]:
    trainer, model = make_trainer()
    trainer.register_hooks(
        [PreciseBN(2, trainer.model, loader(seed=5 + comm.get_rank()), num_iter=2)]
    )
    trainer.train(0, 3)
    with torch.no_grad():
        # The second measurement goes on with the third batch, and begins again.
        third, first = list(loader(seed=5 + comm.get_rank()))[::-2]
        features = [model.linear(batch["x"]) for batch in (third, first)]
    variance = torch.stack([f.var(0) for f in features]).mean(0)
    assert model.norm.running_var is not None
    return {"variance": model.norm.running_var.tolist(), "own": variance.tolist()}


def validation_loss() -> dict[str, Any]:
    trainer, model = make_trainer()
    count = 10 - 7 * comm.get_rank()
    model.norm.eval()
    model.dropout.p = 0.0
    trainer.register_hooks([ValidationLoss(0, trainer.model, loader(count, seed=9))])
    trainer.train(0, 2)
    with torch.no_grad():
        batch = {name: torch.stack([s[name] for s in samples(count, 9)]) for name in ("x", "y")}
        own = model(batch)["loss_mse"].item()
    return {"loss": trainer.storage.latest()["val/loss_mse"][0], "own": own, "count": count}


def early_stopping() -> dict[str, Any]:
    trainer, _ = make_trainer()

    def put(trainer: SimpleTrainer) -> None:
        if comm.is_main_process():
            trainer.storage.put_scalar("score", 1.0, smoothing_hint=False)

    trainer.register_hooks([CallbackHook(after_step=put), EarlyStopping("score", 4)])
    trainer.train(0, 30)
    return {"iter": trainer.iter, "max_iter": trainer.max_iter}


def run(folder: Path) -> None:
    torch.set_num_threads(1)
    results = {case.__name__: case() for case in (precise_bn, validation_loss, early_stopping)}
    (folder / f"{comm.get_rank()}.json").write_text(json.dumps(results))
