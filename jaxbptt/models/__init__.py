"""What was trained, as a thing to use: a model is loaded from its checkpoints alone, and samples, forecasts, is exported."""

from jaxbptt.models.architecture import Architecture as Architecture
from jaxbptt.models.architecture import ModelNetwork as ModelNetwork
from jaxbptt.models.architecture import ModelParams as ModelParams
from jaxbptt.models.architecture import build as build
from jaxbptt.models.export import named_weights as named_weights
from jaxbptt.models.export import save_weights as save_weights
from jaxbptt.models.forecasting import Forecast as Forecast
from jaxbptt.models.forecasting import ValidationErrors as ValidationErrors
from jaxbptt.models.forecasting import forecast as forecast
from jaxbptt.models.forecasting import validation_errors as validation_errors
from jaxbptt.models.model import Columns as Columns
from jaxbptt.models.model import Model as Model
from jaxbptt.models.model import load as load
from jaxbptt.models.sampling import sample as sample
