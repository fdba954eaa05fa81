from ._api import calibrate as calibrate
from ._provenance import versions_used as versions_used
from ._trial import Pushed as Pushed
from ._trial import Trial as Trial
from ._trial import release_memory as release_memory
from ._trial import seeded as seeded
