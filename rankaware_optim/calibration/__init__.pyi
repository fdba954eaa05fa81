from ._api import calibrate as calibrate
from ._constants import SEEDS as SEEDS
from ._constants import TRIALS_PER_RANK as TRIALS_PER_RANK
from ._provenance import versions_used as versions_used
from ._trial import Pushed as Pushed
from ._trial import Trial as Trial
from ._trial import release_memory as release_memory
from ._trial import seeded as seeded
