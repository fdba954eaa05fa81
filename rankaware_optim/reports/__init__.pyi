from ._figure import plot_recipe as plot_recipe
from ._figure import recipe_figure as recipe_figure
from ._page import write_report as write_report
