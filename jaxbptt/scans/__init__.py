"""How a step is unrolled and how its gradient is taken: one strategy a module, one signature for all."""

from jaxbptt.scans.newton import NewtonStates as NewtonStates
from jaxbptt.scans.schedule import Schedule as Schedule
