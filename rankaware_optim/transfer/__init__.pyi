from ._convert import convert_lr as convert_lr
from ._suggest import suggest_lr as suggest_lr
