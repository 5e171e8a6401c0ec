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
# Experiment trackers that get the metrics too: wandb, mlflow (extras). Their own environment
# variables (WANDB_PROJECT, MLFLOW_TRACKING_URI, …) say where.
_C.TRACKERS = ()
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
# "model.pth?strict=True" refuses another model's, "?matching_heuristics=True" matches names by
# their ends. From the web with its SHA-256: https://host/model.pth#sha256=<64 hexadecimal digits>.
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

_C.MODEL.EMA = CfgNode()
# Whether to evaluate a moving average of the weights in their place; checkpoints hold both.
_C.MODEL.EMA.ENABLED = False
# Share of the average that stays in each update, in [0, 1); less in the first updates.
_C.MODEL.EMA.DECAY = 0.999

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
# Those whose losses are put as val/…, beside the training losses, when an evaluation is due.
_C.DATASETS.VAL = ()

_C.DATALOADER = CfgNode()
# Processes that prepare batches, on each rank; 0 prepares them in the training process.
_C.DATALOADER.NUM_WORKERS = 1
# A name in SAMPLER_REGISTRY.
_C.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
# Part of the samples that RandomSubsetTrainingSampler keeps, in (0, 1].
_C.DATALOADER.RANDOM_SUBSET_RATIO = 1.0
# RepeatFactorTrainingSampler repeats samples of categories that fewer than this part of all samples
# have, in [0, 1]: about threshold / frequency times, or by its square root.
_C.DATALOADER.REPEAT_THRESHOLD = 0.0
_C.DATALOADER.REPEAT_SQRT = True

_C.SOLVER = CfgNode()
# Number of optimizer steps.
_C.SOLVER.MAX_ITER = 2000
# Lengths in epochs, which may be fractions: what is above 0 decides MAX_ITER and WARMUP_ITERS.
_C.SOLVER.MAX_EPOCHS = 0.0
_C.SOLVER.WARMUP_EPOCHS = 0.0
# Likewise STEPS and CHECKPOINT_PERIOD.
_C.SOLVER.STEP_EPOCHS = ()
_C.SOLVER.CHECKPOINT_EPOCHS = 0.0
# Seconds after which the run saves and leaves, to be resumed; 0 is no limit. It leaves a little
# earlier, as the longest step or save so far suggests.
_C.SOLVER.MAX_SECONDS = 0.0
# Samples per optimizer step, over all ranks and micro-batches, which must divide it.
_C.SOLVER.IMS_PER_BATCH = 64
# Micro-batches per optimizer step: their gradients add up to that of the whole batch.
_C.SOLVER.ACCUMULATE = 1
# Arithmetic of the forward pass: fp32, or bf16 or fp16 by autocast, fp16 with a gradient scaler.
_C.SOLVER.PRECISION = "fp32"
_C.SOLVER.AMP = CfgNode()
# detectron2's switch for fp16: the same as PRECISION fp16.
_C.SOLVER.AMP.ENABLED = False
# An optimizer of torch.optim, such as SGD or AdamW, or of any package by its full name, such as
# "package.module.Lion"; naming one imports its module.
_C.SOLVER.OPTIMIZER = "SGD"
# Its further arguments by name, such as OPTIMIZER_ARGS: {eps: 1e-6}.
_C.SOLVER.OPTIMIZER_ARGS = CfgNode(new_allowed=True)
# Learning rate that the schedule multiplies.
_C.SOLVER.BASE_LR = 0.1
# Processes that these settings are for: on another number of them, batch size, rates, lengths and
# periods are scaled (trainkit.config.auto_scale). 0 scales nothing.
_C.SOLVER.REFERENCE_WORLD_SIZE = 0
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
# Multiplies the rate of each layer but the topmost, once more with each layer further down, in
# (0, 1]; trainkit.solver.layer_decay tells what a layer is.
_C.SOLVER.LAYER_DECAY = 1.0
# WarmupConstantLR, WarmupCosineLR, WarmupExponentialLR, WarmupLinearLR, WarmupMultiStepLR,
# WarmupPolyLR, WarmupStepWithFixedGammaLR, or ReduceLROnPlateau (which has no warmup).
_C.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
# Learning rate at the end of a cosine, exponential or linear schedule.
_C.SOLVER.BASE_LR_END = 0.0
# WarmupPolyLR multiplies the rate by (1 - iteration / MAX_ITER) to this power.
_C.SOLVER.POLY_LR_POWER = 0.9
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

_C.SOLVER.PLATEAU = CfgNode()
# ReduceLROnPlateau multiplies the rate by FACTOR, in [0, 1), once more than PATIENCE values of its
# metric in a row were no better than the best.
_C.SOLVER.PLATEAU.FACTOR = 0.1
_C.SOLVER.PLATEAU.PATIENCE = 10
# The metric that it watches, such as "classification/top1", and whether "min" or "max" is better.
_C.SOLVER.PLATEAU.METRIC = ""
_C.SOLVER.PLATEAU.MODE = "max"

_C.SOLVER.CLIP_GRADIENTS = CfgNode()
# Whether gradients are clipped before each update.
_C.SOLVER.CLIP_GRADIENTS.ENABLED = False
# full_model (total norm), norm (of each parameter), value (of each element).
_C.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
# Largest norm or absolute value left.
_C.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0
# p of the p-norm; inf takes the largest absolute value.
_C.SOLVER.CLIP_GRADIENTS.NORM_TYPE = 2.0

_C.DDP = CfgNode()
# What DistributedDataParallel is given where there are several processes: whether parameters may
# be left out of a step's loss (slower), and whether each forward pass copies rank 0's buffers.
_C.DDP.FIND_UNUSED_PARAMETERS = False
_C.DDP.BROADCAST_BUFFERS = False
# Whether gradients lie in the buckets (less memory), and whether a step's graph never changes.
_C.DDP.GRADIENT_AS_BUCKET_VIEW = False
_C.DDP.STATIC_GRAPH = False
# MiB of gradients that are reduced at once; None leaves it to torch.
_C.DDP.BUCKET_CAP_MB = None
# Whether gradients travel between processes in fp16.
_C.DDP.FP16_COMPRESSION = False

_C.CHECKPOINT = CfgNode()
# Periodic checkpoints to keep, those of earlier processes included; 0 keeps all.
_C.CHECKPOINT.MAX_TO_KEEP = 3
# Whether a finished run also leaves model_weights.pth, the weights alone, averaged ones if there
# are any: a small file for MODEL.WEIGHTS, torch.load and other programs.
_C.CHECKPOINT.SAVE_WEIGHTS = False
# What a save or a write of metrics that the storage refuses (full, read-only, failing) does to the
# run: raise ends it, warn says so and trains on. The saves at the end and on interruption always
# raise.
_C.CHECKPOINT.ON_ERROR = "raise"
# Whether a periodic save holds training only while the state is copied, to as much memory of the
# host as it takes; a thread writes it.
_C.CHECKPOINT.ASYNC = False

_C.TEST = CfgNode()
# Iterations between two evaluations; 0 evaluates only at the end.
_C.TEST.EVAL_PERIOD = 500
# The same in epochs, if above 0.
_C.TEST.EVAL_EPOCHS = 0.0
# Samples per batch in evaluation, on each rank.
_C.TEST.IMS_PER_BATCH = 500
# Metric whose best model is kept as model_best.pth, such as "classification/top1"; "" keeps none.
_C.TEST.BEST_METRIC = ""
# Whether the largest value of that metric is the best ("max"), or the smallest ("min").
_C.TEST.BEST_MODE = "max"
# What the final evaluation must reach: [[task, metric, value, tolerance], …]; empty checks nothing.
_C.TEST.EXPECTED_RESULTS = []

_C.TEST.PRECISE_BN = CfgNode()
# Whether batch norm's statistics are measured anew before each evaluation, and on how many batches.
_C.TEST.PRECISE_BN.ENABLED = False
_C.TEST.PRECISE_BN.NUM_ITER = 200

_C.TEST.EARLY_STOPPING = CfgNode()
# Metric that ends the run when it no longer improves, such as "val/total_loss"; "" never ends it.
_C.TEST.EARLY_STOPPING.METRIC = ""
# Evaluations in a row without improvement that end the run.
_C.TEST.EARLY_STOPPING.PATIENCE = 5
# Whether "max" or "min" is better.
_C.TEST.EARLY_STOPPING.MODE = "max"
# What improves the best value by no more than this does not count.
_C.TEST.EARLY_STOPPING.MIN_DELTA = 0.0
# A value that is good enough to end the run at once; None is no such value.
_C.TEST.EARLY_STOPPING.THRESHOLD = None


def get_cfg() -> CfgNode:
    """Returns a copy of the default config, to be merged, frozen and handed to the builders."""
    return _C.clone()
