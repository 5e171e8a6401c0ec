"""The 10,000 + 2,000 images of Fashion-MNIST that come with the package."""

from torch.utils.data import default_collate

from trainkit.config import LazyCall as L
from trainkit.data import build_detection_test_loader, build_detection_train_loader
from trainkit.data.datasets.fashion_mnist import CLASSES
from trainkit.data.transforms import Compose, ImageMapper, RandomCrop, RandomHorizontalFlip
from trainkit.evaluation import ClassificationEvaluator

dataloader = {
    "train": L(build_detection_train_loader)(
        dataset=L("trainkit.data.DatasetCatalog.get")(name="fashion_mnist_small_train"),
        mapper=L(ImageMapper)(
            transform=L(Compose)(
                transforms=[L(RandomCrop)(padding=1), L(RandomHorizontalFlip)(prob=0.5)]
            )
        ),
        total_batch_size=64,
        collate_fn=default_collate,
        # The images are in memory: a worker would take more than it gives.
        num_workers=0,
        seed="${train.seed}",
    ),
    "test": L(build_detection_test_loader)(
        dataset=L("trainkit.data.DatasetCatalog.get")(name="fashion_mnist_small_test"),
        batch_size=500,
        collate_fn=default_collate,
        num_workers=0,
    ),
    "evaluator": L(ClassificationEvaluator)(classes=CLASSES),
}
