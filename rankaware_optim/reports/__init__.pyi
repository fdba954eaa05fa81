from ._figure import recipe_figure as recipe_figure
from ._page import write_report as write_report
