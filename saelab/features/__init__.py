"""The feature database: index.py writes it in one pass over text, query.py is what everything later reads.

`saelab.features` is this package and, called with a run folder, the stage that writes its database: an import of any
module in here binds the name to the package, so the package has to be what is called.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, run: Any, overrides: Any = (), **keywords: Any) -> dict[str, Any]:
        from saelab.run import features

        return features(run, overrides, **keywords)


sys.modules[__name__].__class__ = _CallablePackage
