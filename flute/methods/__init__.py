"""What is learned from data: calibrated rounding and activation-aware scaling of a loaded model.

``folder``       a model folder in, a quantized folder out
``model``        `quantize_model`: the walk through a model's blocks
``recipes``      what a method's name stands for; a layer's way through its steps
``calibration``  text to windows of tokens
``capture``      inputs of linear layers, block by block, for any decoder
``hessian``      X^T X, made invertible; the target that makes up for errors before a layer
``awq``          activation-aware scales folded into the layer before
``gptq``         rounding with error feedback, any table
``allocation``   bits for every layer from an average
``sensitivity``  what an error in a layer costs the model
``higgs``        rotation and Gaussian grids, no data
``refine``       codes, scales and table in turns
``codebook``     a table of a layer's own
``stacks``       experts of a mixture, rounded to nearest
``learn``        scales by gradient descent, through the whole model or block by block
``progress``     the state of that on the disk
"""

from .allocation import Allocation, allocate
from .calibration import token_windows
from .higgs import higgs_spec
from .learn import Learned, Learning
from .model import LayerResult, MethodReport, quantize_model
from .recipes import RECIPES, Recipe

__all__ = [
    "RECIPES",
    "Allocation",
    "LayerResult",
    "Learned",
    "Learning",
    "MethodReport",
    "Recipe",
    "allocate",
    "higgs_spec",
    "quantize_model",
    "token_windows",
]
