"""Every config key, with its default, unit and meaning; detectron2's keys where it has them."""

from trainkit.config.config import CfgNode

_C = CfgNode()

# Format of the keys below, as detectron2's configs state it.
_C.VERSION = 2
# Folder of checkpoints, logs and metrics.
_C.OUTPUT_DIR = "./output"
# Seed of everything random, in [0, 2**63). A negative one draws a seed, which checkpoints record.
_C.SEED = -1
# Lets cuDNN try its algorithms and keep the fastest: not deterministic.
_C.CUDNN_BENCHMARK = False
# Uses deterministic kernels only, and refuses operations that have none; docs/reliability.md says
# what it costs. On a GPU, a resumed run is bit-exact only with this.
_C.DETERMINISTIC = False
# torch.set_float32_matmul_precision: "", "highest", "high" or "medium". "" leaves torch's setting.
_C.FLOAT32_PRECISION = ""
# Iterations between two lines of log and metrics.
_C.LOG_PERIOD = 20
# Iterations between two reductions of metrics over ranks, which are also the moments at which
# several ranks agree to stop.
_C.GATHER_METRIC_PERIOD = 20
# A dry run: stop after this many iterations, and evaluate on this many batches. 0 runs everything.
_C.LIMIT_BATCHES = 0

_C.MODEL = CfgNode()
# auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps.
_C.MODEL.DEVICE = "auto"
# Lays images out with their channels last, which makes convolutions faster on most hardware.
_C.MODEL.CHANNELS_LAST = True
# A name in META_ARCH_REGISTRY.
_C.MODEL.META_ARCHITECTURE = "ImageClassifier"
# Checkpoint whose weights a new run starts from: what fits is loaded, the rest is reported.
# From the web with its SHA-256: https://host/model.pth#sha256=<64 hexadecimal digits>.
_C.MODEL.WEIGHTS = ""
# Whether MODEL.WEIGHTS may be a file that runs code when it is loaded, such as a .pkl of
# detectron2's model zoo. Such code can do all that you can, so only for files whose makers you
# trust. Checkpoints in OUTPUT_DIR, and all others, never run code.
_C.MODEL.TRUST_PICKLE = False
# Classes of the data sets.
_C.MODEL.NUM_CLASSES = 10
# Mean and standard deviation of each input channel, in pixel values (0 to 255); Fashion-MNIST's.
_C.MODEL.PIXEL_MEAN = [72.94]
_C.MODEL.PIXEL_STD = [90.02]
# Probability of zeroing a feature before the last layer, in [0, 1).
_C.MODEL.DROPOUT = 0.0
# Share of the target's probability spread over all classes, in [0, 1).
_C.MODEL.LABEL_SMOOTHING = 0.0

_C.MODEL.BACKBONE = CfgNode()
# A name in BACKBONE_REGISTRY.
_C.MODEL.BACKBONE.NAME = "SmallResNet"
# Channels, and number of residual blocks, of each stage. Each stage but the first halves the
# resolution; 0 blocks leave the first stage to the stem.
_C.MODEL.BACKBONE.WIDTHS = (16, 32, 64, 128)
_C.MODEL.BACKBONE.BLOCKS = (0, 1, 1, 1)

_C.INPUT = CfgNode()
# Augmentation in training. Pixels of zero padding around the image before a random crop; 0 is off.
_C.INPUT.CROP_PADDING = 1
# Probabilities of a horizontal flip and of erasing a random rectangle, in [0, 1].
_C.INPUT.FLIP_PROB = 0.5
_C.INPUT.ERASE_PROB = 0.0

_C.DATASETS = CfgNode()
# Names in DatasetCatalog; several data sets to train on are concatenated.
_C.DATASETS.TRAIN = ("fashion_mnist_small_train",)
_C.DATASETS.TEST = ("fashion_mnist_small_test",)

_C.DATALOADER = CfgNode()
# Processes that prepare batches, on each rank; 0 prepares them in the training process.
_C.DATALOADER.NUM_WORKERS = 1
# A name in SAMPLER_REGISTRY.
_C.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"

_C.SOLVER = CfgNode()
# Number of optimizer steps.
_C.SOLVER.MAX_ITER = 2000
# Samples per optimizer step, over all ranks and micro-batches, which must divide it.
_C.SOLVER.IMS_PER_BATCH = 64
# Micro-batches per optimizer step: their gradients add up to that of the whole batch.
_C.SOLVER.ACCUMULATE = 1
# Arithmetic of the forward pass: fp32, or bf16 by autocast.
_C.SOLVER.PRECISION = "fp32"
# SGD, Adam or AdamW.
_C.SOLVER.OPTIMIZER = "SGD"
# Learning rate that the schedule multiplies.
_C.SOLVER.BASE_LR = 0.1
# Momentum of SGD, and whether it is Nesterov's.
_C.SOLVER.MOMENTUM = 0.9
_C.SOLVER.NESTEROV = False
# Decay rates of Adam's and AdamW's averages of the gradient and its square.
_C.SOLVER.BETAS = (0.9, 0.999)
# Weight decay of all parameters that the next two keys do not name.
_C.SOLVER.WEIGHT_DECAY = 0.0001
# Weight decay of normalization layers, and of biases (None: WEIGHT_DECAY).
_C.SOLVER.WEIGHT_DECAY_NORM = 0.0
_C.SOLVER.WEIGHT_DECAY_BIAS = None
# Multiplies BASE_LR for biases.
_C.SOLVER.BIAS_LR_FACTOR = 1.0
# WarmupCosineLR, WarmupMultiStepLR or WarmupStepWithFixedGammaLR.
_C.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
# Learning rate at the end of a cosine schedule.
_C.SOLVER.BASE_LR_END = 0.0
# Iterations at which WarmupMultiStepLR multiplies the rate by GAMMA.
_C.SOLVER.STEPS = (1200, 1800)
_C.SOLVER.GAMMA = 0.1
# Number of equal decays of WarmupStepWithFixedGammaLR.
_C.SOLVER.NUM_DECAYS = 3
# The rate starts at WARMUP_FACTOR times the schedule's and reaches it after WARMUP_ITERS
# iterations.
_C.SOLVER.WARMUP_FACTOR = 0.001
_C.SOLVER.WARMUP_ITERS = 200
# linear or constant.
_C.SOLVER.WARMUP_METHOD = "linear"
# Whether the schedule is squeezed into the iterations after the warmup instead of overlaid by it.
_C.SOLVER.RESCALE_INTERVAL = False
# Iterations between two checkpoints; 0 saves only at the end.
_C.SOLVER.CHECKPOINT_PERIOD = 500
# What a loss or gradient that is not finite does: raise ends the run, skip leaves that update out,
# rollback goes back to the last checkpoint and passes the batch over. The last two wait for an
# accelerator in every step.
_C.SOLVER.NON_FINITE = "raise"

_C.SOLVER.CLIP_GRADIENTS = CfgNode()
# Whether gradients are clipped before each update.
_C.SOLVER.CLIP_GRADIENTS.ENABLED = False
# full_model (total norm), norm (of each parameter), value (of each element).
_C.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
# Largest norm or absolute value left.
_C.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0
# p of the p-norm; inf takes the largest absolute value.
_C.SOLVER.CLIP_GRADIENTS.NORM_TYPE = 2.0

_C.CHECKPOINT = CfgNode()
# Periodic checkpoints to keep, those of earlier processes included; 0 keeps all.
_C.CHECKPOINT.MAX_TO_KEEP = 3
# What a save or a write of metrics that the storage refuses (full, read-only, failing) does to the
# run: raise ends it, warn says so and trains on. The saves at the end and on interruption always
# raise.
_C.CHECKPOINT.ON_ERROR = "raise"

_C.TEST = CfgNode()
# Iterations between two evaluations; 0 evaluates only at the end.
_C.TEST.EVAL_PERIOD = 500
# Samples per batch in evaluation, on each rank.
_C.TEST.IMS_PER_BATCH = 500
# Metric whose best model is kept as model_best.pth, such as "classification/top1"; "" keeps none.
_C.TEST.BEST_METRIC = ""
# What the final evaluation must reach: [[task, metric, value, tolerance], …]; empty checks nothing.
_C.TEST.EXPECTED_RESULTS = []


def get_cfg() -> CfgNode:
    """Returns a copy of the default config, to be merged, frozen and handed to the builders."""
    return _C.clone()
