from ._figure import recipe_figure as recipe_figure
from ._page import report_html as report_html
