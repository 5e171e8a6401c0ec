"""Makes the files of this folder anew, for `test_kept.py`: python -m tests.checkpoint.kept.make.

Once they are committed they stay as they are: that they load is a promise of every later version.
For what a new version writes, add a file of another name.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer as FvcoreCheckpointer
from torch import nn

from tests.checkpoint.forge import seal, unsealed
from trainkit.checkpoint.format import write_checkpoint

FOLDER = Path(__file__).parent
ITERATION = 99


class Model(nn.Module):
    """A layer whose values tell that they were loaded.

    Args:
        scale: Of the weights 1 to 6 and the biases 7 and 8.
    """

    def __init__(self, scale: float = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        with torch.no_grad():
            self.linear.weight.copy_(scale * torch.arange(1.0, 7).reshape(2, 3))
            self.linear.bias.copy_(scale * torch.tensor([7.0, 8.0]))


def detectron2_state(model: nn.Module) -> dict[str, Any]:
    """What detectron2's DefaultTrainer says of itself, with a momentum of 7 everywhere."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, 7)
    schedule = {"base_lrs": [0.1], "last_epoch": ITERATION + 1}
    return {
        "iteration": ITERATION,
        "hooks": {"LRScheduler": schedule},
        "_trainer": {"iteration": ITERATION, "hooks": {}, "optimizer": optimizer.state_dict()},
    }


def main() -> None:
    model = Model(scale=1)
    state = {"model": model.state_dict(), "iteration": ITERATION}
    write_checkpoint(state, FOLDER / "schema_1.pth", iteration=ITERATION, facts={"kept": True})
    archive = unsealed(FOLDER / "schema_1.pth")
    (FOLDER / "schema_2.pth").write_bytes(seal(archive, {"schema": 2, "shards": ["a", "b"]}))
    torch.save(state, FOLDER / "torch.pth")
    torch.save(state, FOLDER / "torch_legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(model.state_dict(), FOLDER / "weights.pth")
    FvcoreCheckpointer(model, str(FOLDER)).save("fvcore", iteration=ITERATION)
    (FOLDER / "last_checkpoint").unlink()
    torch.save({**state, "trainer": detectron2_state(model)}, FOLDER / "detectron2.pth")
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    zoo = {"model": arrays, "__author__": "Detectron2 Model Zoo"}
    # As NumPy 1 named it, which NumPy 2 reads too.
    pickled = pickle.dumps(zoo, protocol=2).replace(b"numpy._core", b"numpy.core")
    (FOLDER / "detectron2.pkl").write_bytes(pickled)


if __name__ == "__main__":
    main()
