"""Estimates of dc_t/dθ carried forward in time, for `forward_scan` and `tbptt`: one a file, exact or judged by `score_gradients`."""

from jaxbptt.influences.eprop import eprop as eprop
from jaxbptt.influences.influence import Influence as Influence
from jaxbptt.influences.kf_rtrl import kf_rtrl as kf_rtrl
from jaxbptt.influences.low_rank import low_rank as low_rank
from jaxbptt.influences.rflo import rflo as rflo
from jaxbptt.influences.rtrl import rtrl as rtrl
from jaxbptt.influences.snap import snap as snap
from jaxbptt.influences.uoro import uoro as uoro
