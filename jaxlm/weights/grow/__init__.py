"""Makes larger models of trained ones: pure functions of configurations, specs and weights.

What a weight is for is read from its `Spec`: its logical axes, its role and `Spec.silent`. A family adds which fields
count its layers (`ModelConfig.layer_counts`, `layer_patterns`) and what it becomes with experts (`with_experts`).
Weights are nested dicts of NumPy arrays.
"""
