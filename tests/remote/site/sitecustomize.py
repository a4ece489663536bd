"""A sandbox builds its models without weights, for which nnsight 0.8.1 looks up a pipeline class that transformers 5.23 names by a
string."""

import importlib.abc
import importlib.machinery
import sys


class Mend(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "nnsight.modeling.transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            stock = module.TransformersModel._loaded_preprocessors

            def mended(self):
                import transformers.pipelines as pipelines
                from nnsight.util import from_import_path

                check_task = pipelines.check_task

                def resolved(task):
                    name, found, options = check_task(task)
                    if isinstance(found.get("impl"), str):
                        found = {**found, "impl": from_import_path(found["impl"])}
                    return name, found, options

                pipelines.check_task = resolved
                try:
                    return stock(self)
                finally:
                    pipelines.check_task = check_task

            module.TransformersModel._loaded_preprocessors = mended

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Mend())
