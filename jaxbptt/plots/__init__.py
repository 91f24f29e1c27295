r"""Figures from analysis results. Each function draws in a new matplotlib figure, or in the Axes given as `ax`.

It returns a `Drawing`: the figure, its panels, and by name every artist, to be restyled or read. No global state is touched.
With `dt=0.02, unit="s"` time and lags are drawn in seconds.

Colours are Okabe and Ito's, which colour-blind readers tell apart, and lines in one panel differ in dash or marker too.
Values that are not finite, or 0 on a logarithmic axis, are left out. Needs the extra `report`.
"""

from jaxbptt.plots.convergence import plot_lyapunov_convergence as plot_lyapunov_convergence
from jaxbptt.plots.dynamics import plot_fixed_point_eigenvalues as plot_fixed_point_eigenvalues
from jaxbptt.plots.dynamics import plot_fixed_points as plot_fixed_points
from jaxbptt.plots.figure import COLOURS as COLOURS
from jaxbptt.plots.figure import Drawing as Drawing
from jaxbptt.plots.forecast import plot_forecast as plot_forecast
from jaxbptt.plots.forward import plot_influence as plot_influence
from jaxbptt.plots.forward import plot_kept_contributions as plot_kept_contributions
from jaxbptt.plots.gradients import plot_certificate as plot_certificate
from jaxbptt.plots.gradients import plot_gradient_flow as plot_gradient_flow
from jaxbptt.plots.learning import plot_learning_curve as plot_learning_curve
from jaxbptt.plots.lines import plot_lines as plot_lines
from jaxbptt.plots.matrices import plot_matrices as plot_matrices
from jaxbptt.plots.parallel import plot_newton_errors as plot_newton_errors
from jaxbptt.plots.parallel import plot_newton_iterations as plot_newton_iterations
from jaxbptt.plots.parallel import plot_scan_tree as plot_scan_tree
from jaxbptt.plots.rates import plot_gradient_rates as plot_gradient_rates
from jaxbptt.plots.saliency import plot_text_saliency as plot_text_saliency
from jaxbptt.plots.schedule import plot_schedule as plot_schedule
from jaxbptt.plots.scoreboard import plot_scoreboard as plot_scoreboard
from jaxbptt.plots.spectra import plot_eigenvalues as plot_eigenvalues
from jaxbptt.plots.spectra import plot_log_norms as plot_log_norms
from jaxbptt.plots.spectra import plot_lyapunov_spectrum as plot_lyapunov_spectrum
from jaxbptt.plots.spectra import plot_singular_values as plot_singular_values
from jaxbptt.plots.truncation import plot_lag_contributions as plot_lag_contributions
from jaxbptt.plots.truncation import plot_surviving_paths as plot_surviving_paths
from jaxbptt.plots.truncation import plot_truncation_bias as plot_truncation_bias
