"""Every form of a routed layer, one line each, by the name of its kind."""

from __future__ import annotations

from typing import Any

from exporter.clear_form import ClearForm
from exporter.gated_form import GatedForm
from exporter.layer_form import LayerForm
from exporter.routed_form import RoutedForm
from moee.layer import RoutedLayer
from moee.layer_kinds import kind_of

FORMS: dict[str, LayerForm[Any]] = {form.name: form for form in (RoutedForm(), ClearForm(), GatedForm())}


def form_of(layer: RoutedLayer) -> LayerForm[Any]:
    """The form of a layer's kind."""
    kind = kind_of(layer).name
    assert kind in FORMS, f"layers of the kind {kind} have no form; list it in {__name__}"
    return FORMS[kind]
