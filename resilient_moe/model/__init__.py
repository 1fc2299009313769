"""The model: pure functions of pytrees."""

from resilient_moe.model.checkpoint import load_checkpoint as load_checkpoint
from resilient_moe.model.checkpoint import save_checkpoint as save_checkpoint
from resilient_moe.model.config import ModelConfig as ModelConfig
from resilient_moe.model.config import StepOptions as StepOptions
from resilient_moe.model.forward import forward as forward
from resilient_moe.model.forward import train_forward as train_forward
from resilient_moe.model.params import describe as describe
from resilient_moe.model.params import init_params as init_params
