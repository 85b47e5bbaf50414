"""`newllm check`: the layer contract on a saved model or on layer types, told in words."""

from __future__ import annotations

from newllm.errors import UserError

VERDICTS = {True: "ok", False: "FAILED", None: "-"}


def check(folder: str | None, plugin: str | None, models: list[str]) -> bool:
    """Prints each point of the contract; True if none is broken.

    Args:
        folder: a run folder or model folder, or None to check small, freshly initialised models of layer types.
        plugin: a Python file to load first; without `models` all layer types it registers are checked.
        models: presets or layer types.
    """
    if folder is not None and models:
        raise UserError("give a MODEL folder or --models, not both")
    if folder is None and plugin is None and not models:
        raise UserError("nothing to check: give a MODEL folder, --plugin FILE or --models NAME …")
    from newllm.commands.folders import plugin_of
    from newllm.evaluation.checks import check_layer_types, check_model, failed
    from newllm.models import load_model, load_plugin, meta_model

    if folder is not None:
        plugin = plugin_of(folder, plugin)
    own = load_plugin(plugin) if plugin is not None else []
    if folder is not None:
        results = {folder: check_model(load_model(folder))}
    else:
        for name in models:
            meta_model(name)
        results = check_layer_types(models or own)
    broken = {name: failed(checks) for name, checks in results.items() if failed(checks)}
    for name, checks in results.items():
        print(name)
        for result in checks:
            print(f"  {VERDICTS[result.passed]:6}  {result.name:9} {result.detail}")
    print("all checks passed" if not broken else f"broken: {', '.join(broken)}")
    return not broken
