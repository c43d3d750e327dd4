"""Follows tensors through a module, from `.parameters()` to the place where their sizes are added up.

An abstract interpreter over libcst trees: every expression has a value of `values.py`, most of them unknown. A module
is run up to three times, until nothing new is known: functions learn what they are called with, callers what functions
give back, and the last run collects the places. Loops run once, and after an `if` a name holds what either branch gave.
Left out: aliases across files, `exec`, and values that travel through containers other than lists, dicts and tuples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import libcst as cst

from quantcheck_lint import calls
from quantcheck_lint.trees import called, children, dotted, names, number, requires_grad, walk, words
from quantcheck_lint.values import (
    Each,
    ElementSize,
    Function,
    Items,
    Lookup,
    Number,
    Origin,
    Place,
    Store,
    Tensor,
    Use,
    Value,
    either,
    element,
    has_tensor,
    settled,
    tensor,
    trained,
)

# Code that names one of these knows about packed or partitioned weights: it is left alone.
GUARDS = ("Params4bit", "quant_state", "QuantState", "ds_numel", "ds_tensor")
# So does code that names these, where they are ours: `count_params` is a favourite name for naive counts as well.
OUR_GUARDS = ("count_params", "logical_numel")
POSITIONS = ("offset", "offsets", "idx", "index", "pointer", "ptr", "start", "end", "pos", "position", "cursor")
BUFFERS = ("buffer", "buf", "bucket", "flat", "chunk", "padded", "padding", "alignment")
OFFSETS = frozenset((*POSITIONS, *BUFFERS))
PARAMETER_LIKE = re.compile(r"(?:\w+_)?(?:params|parameters|param_list|state_dict|weights)|sd")
MOST_RUNS = 3


@dataclass(slots=True)
class Scope:
    """The names of a function, a module or a comprehension. Keys are dotted: `self.params` is a name, too."""

    parent: Scope | None = None
    names: dict[str, Value | None] = field(default_factory=dict)
    attributes: dict[str, Value] | None = None

    def get(self, name: str) -> Value | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            if scope.attributes is not None and name in scope.attributes:
                return scope.attributes[name]
            scope = scope.parent
        return None

    def knows(self, name: str) -> bool:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return True
            scope = scope.parent
        return False

    def put(self, name: str, value: Value | None) -> None:
        self.names[name] = value
        if value is not None and name.startswith(("self.", "cls.")):
            self.keep_attribute(name, value)

    def keep_attribute(self, name: str, value: Value) -> None:
        """Remember `self.name` for the other methods of the class; what was known first stays."""
        scope: Scope | None = self
        while scope is not None and scope.attributes is None:
            scope = scope.parent
        if scope is not None and scope.attributes is not None:
            scope.attributes["self." + name.partition(".")[2]] = (
                either(scope.attributes.get("self." + name.partition(".")[2]), value) or value
            )


class Flow:
    """The places of one module, found by running it on abstract values."""

    def __init__(self, module: cst.Module, text: str) -> None:
        guards = (*GUARDS, *OUR_GUARDS) if "pytest_quantcheck" in text else GUARDS
        self._guard_words = tuple(guard for guard in guards if guard in text)
        self.places: dict[int, Place] = {}
        self._functions: dict[int, Function] = {}
        self._attributes: dict[int, dict[str, Value]] = {}
        self._globals = Scope(attributes=None)
        self._deferred: list[tuple[cst.FunctionDef, Scope]] = []
        self._returned: list[Value | None] = []
        self._guards: list[bool] = []
        self._loops: list[cst.For | cst.While] = []
        self._trainable = 0
        self._made: list[Use] = []
        # What was added to a name, or to the entries of a mapping, in the function that is being run.
        self._totals: dict[str, list[Use]] = {}
        self._guarded_nodes: dict[int, bool] = {}
        for _ in range(MOST_RUNS):
            known = self._known()
            for place in self.places.values():
                place.uses.clear()
            self._run(module)
            if self._known() == known:
                break

    def _known(self) -> list[object]:
        """What one run tells the next; when it stays the same there is no need for another one."""
        functions = [(id(one.node), _shape(one.returns), len(one.received)) for one in self._functions.values()]
        attributes = [(node, name) for node, kept in self._attributes.items() for name in kept]
        return [
            {one for one in functions if one[1] or one[2]},
            set(attributes),
            {name for name, value in self._globals.names.items() if _shape(value)},
        ]

    def _run(self, module: cst.Module) -> None:
        self._body(module.body, self._globals)
        self._drain(0)

    def _drain(self, start: int) -> None:
        while len(self._deferred) > start:
            function, scope = self._deferred.pop(start)
            self._function_body(function, scope)

    # Statements

    def _body(self, body: Sequence[cst.CSTNode], scope: Scope) -> None:
        """Run statements in order; after `if not p.requires_grad: continue` the rest is about trainable tensors."""
        filtered = 0
        for statement in body:
            self._statement(statement, scope)
            if isinstance(statement, cst.If) and _skips_frozen(statement):
                self._trainable += 1
                filtered += 1
        self._trainable -= filtered

    def _statement(self, node: cst.CSTNode, scope: Scope) -> None:
        handler = _STATEMENTS.get(type(node))
        if handler is not None:
            handler(self, node, scope)
        else:
            self._generic(node, scope)

    def _generic(self, node: cst.CSTNode, scope: Scope) -> None:
        for child in children(node):
            if isinstance(child, cst.BaseExpression):
                self.value(child, scope)
            elif isinstance(child, (cst.IndentedBlock, cst.SimpleStatementSuite)):
                self._body(child.body, scope)
            else:
                self._statement(child, scope)

    def _block(self, node: cst.BaseSuite | cst.SimpleStatementLine, scope: Scope) -> None:
        self._body(node.body, scope)

    def _assign(self, node: cst.Assign, scope: Scope) -> None:
        targets = [target.target for target in node.targets]
        if len(targets) == 1 and self._pairwise(targets[0], node.value, scope):
            return
        made = len(self._made)
        value = self.value(node.value, scope)
        if any(map(self._is_offset, targets)):
            # Whatever is computed from the sums: the result is the size of a buffer.
            for use in self._made[made:]:
                use.discarded = True
        for target in targets:
            self._assign_one(target, node.value, value, scope)

    def _pairwise(self, target: cst.BaseExpression, value: cst.BaseExpression, scope: Scope) -> bool:
        """`a, b = x, y`: each name gets its own value."""
        if not isinstance(target, (cst.Tuple, cst.List)) or not isinstance(value, (cst.Tuple, cst.List)):
            return False
        if len(target.elements) != len(value.elements):
            return False
        for one, expression in zip(target.elements, value.elements, strict=True):
            self._assign_one(one.value, expression.value, self.value(expression.value, scope), scope)
        return True

    def _assign_one(
        self, target: cst.BaseExpression, expression: cst.BaseExpression, value: Value | None, scope: Scope
    ) -> None:
        if isinstance(value, Number) and _adds_to(target, expression):
            self._add_up(value, expression, target)
            value = None
        if isinstance(value, Number) and not value.settled and _is_bytes(target):
            calls.in_memory(value)
        self._bind(target, settled(value), scope)

    def _annotated(self, node: cst.AnnAssign, scope: Scope) -> None:
        if node.value is not None:
            self._assign_one(node.target, node.value, self.value(node.value, scope), scope)

    def _walrus(self, node: cst.NamedExpr, scope: Scope) -> Value | None:
        value = self.value(node.value, scope)
        self._bind(node.target, value, scope)
        return value

    def _augmented(self, node: cst.AugAssign, scope: Scope) -> None:
        value = self.value(node.value, scope)
        name = dotted(node.target)
        before = scope.get(name) if name else None
        if isinstance(node.operator, (cst.AddAssign, cst.SubtractAssign)):
            if isinstance(value, Number):
                self._add_up(value, node.value, node.target)
                self._take_back(node)
            elif isinstance(before, Number) and before.uses:
                self._correct(before, node.value, scope)
            elif before is None and isinstance(value, Each) and name:
                scope.put(name, value)
            elif isinstance(node.target, cst.Subscript) and isinstance(value, Each):
                self._bind(node.target, value, scope)
        elif not isinstance(before, Number):
            self.value(node.target, scope)

    def _take_back(self, node: cst.AugAssign) -> None:
        """`sizes[dtype] -= p.numel()`: entries that are counted down again are positions in buffers."""
        if isinstance(node.operator, cst.SubtractAssign) and isinstance(node.target, cst.Subscript):
            for use in self._totals.get(dotted(node.target.value) or "", ()):
                use.discarded = True

    def _correct(self, total: Number, expression: cst.BaseExpression, scope: Scope) -> None:
        """`total -= self.wpe.weight.numel()` after a naive sum: the same mistake about one weight."""
        read = calls.size_read(expression)
        if read is None or not isinstance(read.subject, cst.Attribute):
            return
        if read.subject.attr.value in {"weight", "bias"} and dotted(read.subject):
            place = self._place(expression, read.subject, Tensor(Origin.PARAMETERS))
            place.uses[id(expression)] = Use(trainable=all(use.trainable for use in total.uses))

    def _for(self, node: cst.For, scope: Scope) -> None:
        of = _at(node, element(self.value(node.iter, scope)))
        self._bind(node.target, of, scope)
        self._loops.append(node)
        with self._guarding(node, of):
            self._body(node.body.body, scope)
        self._loops.pop()
        if node.orelse is not None:
            self._statement(node.orelse, scope)

    def _while(self, node: cst.While, scope: Scope) -> None:
        self._loops.append(node)
        self._generic(node, scope)
        self._loops.pop()

    def _if(self, node: cst.If, scope: Scope) -> None:
        self.value(node.test, scope)
        asks = requires_grad(node.test)
        guarded = self._is_guarded(node.test)
        before = dict(scope.names)
        with self._filtering(asks is True), self._guarded(guarded):
            self._body(node.body.body, scope)
        after_body, scope.names = scope.names, before
        if node.orelse is not None:
            with self._filtering(asks is False), self._guarded(guarded):
                self._statement(node.orelse, scope)
        if _leaves(node.body):
            return
        for name, value in after_body.items():
            scope.names[name] = either(value, scope.names.get(name)) if name in scope.names else value

    def _else(self, node: cst.Else | cst.Finally, scope: Scope) -> None:
        self._body(node.body.body, scope)

    def _with(self, node: cst.With, scope: Scope) -> None:
        for item in node.items:
            value = self.value(item.item, scope)
            if item.asname is not None:
                self._bind(item.asname.name, value, scope)
        self._body(node.body.body, scope)

    def _delete(self, node: cst.Del, scope: Scope) -> None:
        name = dotted(node.target)
        if name:
            scope.names[name] = None

    def _return(self, node: cst.Return, scope: Scope) -> None:
        if node.value is not None:
            self._returned.append(settled(self._kept(self.value(node.value, scope))))

    def _yield(self, node: cst.Yield, scope: Scope) -> Value | None:
        if isinstance(node.value, cst.From):
            self._returned.append(self.value(node.value.item, scope))
        elif node.value is not None:
            value = self._kept(self.value(node.value, scope))
            self._returned.append(None if value is None else Each(value))
        return None

    # Functions and classes

    def _define(self, node: cst.FunctionDef, scope: Scope) -> None:
        for decorator in node.decorators:
            self.value(decorator.decorator, scope)
        for parameter in _parameters(node.params):
            if parameter.default is not None:
                self.value(parameter.default, scope)
        scope.put(node.name.value, self._function(node))
        self._deferred.append((node, scope))

    def _function(self, node: cst.FunctionDef | cst.Lambda) -> Function:
        return self._functions.setdefault(id(node), Function(node))

    def _function_body(self, node: cst.FunctionDef, scope: Scope) -> None:
        function = self._function(node)
        local = Scope(scope)
        for parameter in _parameters(node.params):
            name = parameter.name.value
            local.names[name] = function.received.get(name) or _lookalike(name)
        outer = self._returned, self._guards, self._loops, self._trainable, self._totals, len(self._deferred)
        # Where a function is given one tensor, its body is what the loop would be.
        known = any(isinstance(value, Tensor) for value in function.received.values())
        self._returned, self._loops, self._trainable, self._totals = [], [], 0, {}
        self._guards = [known and self._is_guarded(node.body)]
        self._body(node.body.body, local)
        function.returns = either(*self._returned)
        self._returned, self._guards, self._loops, self._trainable, self._totals, start = outer
        self._drain(start)
        if scope.attributes is not None:
            is_property = any("property" in words(decorator.decorator) for decorator in node.decorators)
            kept = function.returns if is_property else function
            if kept is not None:
                scope.keep_attribute(f"self.{node.name.value}", kept)

    def _class(self, node: cst.ClassDef, scope: Scope) -> None:
        start = len(self._deferred)
        inside = Scope(scope, attributes=self._attributes.setdefault(id(node), {}))
        self._body(node.body.body, inside)
        methods, self._deferred[start:] = self._deferred[start:], []
        for method, method_scope in methods:
            self._function_body(method, method_scope)

    def _lambda(self, node: cst.Lambda, scope: Scope) -> Value | None:
        return self._apply(node, [], scope)

    def _apply(self, node: cst.Lambda, given: Sequence[Value | None], scope: Scope) -> Function:
        """The lambda `node`, its body run with `given` as arguments."""
        local = Scope(scope)
        function = self._function(node)
        for i, parameter in enumerate(_parameters(node.params)):
            received = function.received.get(parameter.name.value)
            value = given[i] if i < len(given) and given[i] is not None else received
            local.names[parameter.name.value] = value
            if value is not None:
                function.received[parameter.name.value] = value
        known = any(has_tensor(value) for value in local.names.values())
        with self._guarded(known and self._is_guarded(node.body)):
            function.returns = self.value(node.body, local)
        return function

    # Expressions

    def value(self, node: cst.CSTNode, scope: Scope) -> Value | None:
        """The abstract value of an expression; everything below it is visited exactly once."""
        handler = _EXPRESSIONS.get(type(node))
        if handler is not None:
            value: Value | None = handler(self, node, scope)
            return value
        self._visit_below(node, scope)
        return None

    def _visit_below(self, node: cst.CSTNode, scope: Scope) -> None:
        for child in children(node):
            self.value(child, scope)

    def _name(self, node: cst.Name, scope: Scope) -> Value | None:
        if scope.knows(node.value):
            return scope.get(node.value)
        return _lookalike(node.value)

    def _attribute(self, node: cst.Attribute, scope: Scope) -> Value | None:
        name = dotted(node)
        if name is not None:
            known = scope.get("self." + name[4:] if name.startswith("cls.") else name)
            if known is not None:
                return known
        value = self.value(node.value, scope)
        attribute = node.attr.value
        if attribute in calls.EXACT_SIZES:
            return ElementSize()
        if attribute in {"data", "T", "detach"}:
            return tensor(value)
        if attribute == "_parameters":
            return Lookup(Tensor(Origin.PARAMETERS))
        return _lookalike(attribute) if not isinstance(value, (Tensor, Store)) else None

    def _subscript(self, node: cst.Subscript, scope: Scope) -> Value | None:
        value = self.value(node.value, scope)
        for item in node.slice:
            self._visit_below(item.slice, scope)
        if len(node.slice) != 1:
            return None
        index = node.slice[0].slice
        match value:
            case Each(of):
                return value if isinstance(index, cst.Slice) else of
            case Lookup(of):
                return of
            case Store():
                return value
            case Items(items) if isinstance(index, cst.Index):
                return _item(items, index.value)
        return _group(index) if not isinstance(value, (Tensor, Number)) else None

    def _sequence(self, node: cst.Tuple | cst.List | cst.Set, scope: Scope) -> Value | None:
        found: list[Value | None] = []
        for one in node.elements:
            value = self.value(one.value, scope)
            found.append(element(value) if isinstance(one, cst.StarredElement) else value)
        if isinstance(node, cst.Tuple) and not any(isinstance(one, cst.StarredElement) for one in node.elements):
            return Items(tuple(found)) if any(value is not None for value in found) else None
        of = self._kept(either(*found))
        return None if of is None else Each(of)

    def _dict(self, node: cst.Dict, scope: Scope) -> Value | None:
        found: list[Value | None] = []
        for one in node.elements:
            value = self.value(one.value, scope)
            if isinstance(one, cst.DictElement):
                self.value(one.key, scope)
                found.append(value)
            else:
                found.append(value.of if isinstance(value, Lookup) else None)
        of = self._kept(either(*found))
        return None if of is None else Lookup(of)

    def _comprehension(self, node: cst.GeneratorExp | cst.ListComp | cst.SetComp, scope: Scope) -> Value | None:
        value = self._inside(node.for_in, [node.elt], node, scope)[0]
        return None if value is None else Each(value)

    def _dict_comprehension(self, node: cst.DictComp, scope: Scope) -> Value | None:
        value = self._inside(node.for_in, [node.value, node.key], node, scope)[0]
        return None if value is None else Lookup(value)

    def _inside(
        self, clause: cst.CompFor, expressions: Sequence[cst.BaseExpression], node: cst.CSTNode, scope: Scope
    ) -> list[Value | None]:
        """Values of what a comprehension gives, under its loops and conditions."""
        local, filters, guards = Scope(scope), 0, 0
        inner: cst.CompFor | None = clause
        while inner is not None:
            of = _at(node, element(self.value(inner.iter, local)), inner.target)
            self._bind(inner.target, of, local)
            if has_tensor(of):
                self._guards.append(self._is_guarded(node))
                guards += 1
            for condition in inner.ifs:
                self.value(condition.test, local)
                if requires_grad(condition.test) is True:
                    filters += 1
            inner = inner.inner_for_in
        self._trainable += filters
        values = [self._kept(self.value(expression, local)) for expression in expressions]
        self._trainable -= filters
        if guards:
            del self._guards[-guards:]
        return values

    def _kept(self, value: Value | None) -> Value | None:
        """What is put into a container or given back, marked when only trainable tensors get here."""
        return trained(value) if self._trainable else value

    def _conditional(self, node: cst.IfExp, scope: Scope) -> Value | None:
        self.value(node.test, scope)
        asks = requires_grad(node.test)
        with self._guarded(self._is_guarded(node)):
            with self._filtering(asks is True):
                body = self._kept(self.value(node.body, scope))
            with self._filtering(asks is False):
                otherwise = self._kept(self.value(node.orelse, scope))
        return either(body, otherwise)

    def _boolean(self, node: cst.BooleanOperation, scope: Scope) -> Value | None:
        return either(self.value(node.left, scope), self.value(node.right, scope))

    def _binary(self, node: cst.BinaryOperation, scope: Scope) -> Value | None:
        left, right = self.value(node.left, scope), self.value(node.right, scope)
        return calls.arithmetic(node, left, right)

    def _passed(self, node: cst.Await | cst.UnaryOperation, scope: Scope) -> Value | None:
        return self.value(node.expression, scope)

    def _call(self, node: cst.Call, scope: Scope) -> Value | None:
        read = calls.size_read(node)
        if read is not None:
            return self._read(node, read, scope)
        return calls.call(self, node, scope)

    def _read(self, node: cst.Call, read: calls.SizeRead, scope: Scope) -> Value | None:
        """`p.numel()` and its like: a place if `p` is a tensor that we follow."""
        for expression in read.others:
            self.value(expression, scope)
        value = self.value(read.subject, scope)
        if isinstance(value, Items) and value.named:
            place = self._place(node, read.subject, Tensor(Origin.PARAMETERS))
            place.packed = value
            return Number((place,))
        of = tensor(value)
        if of is None:
            return None
        place = self._place(node, read.subject, of)
        return Number((place,), trainable=of.trainable or self._trainable > 0)

    def _place(self, node: cst.BaseExpression, subject: cst.BaseExpression | None, of: Tensor) -> Place:
        guarded = any(self._guards)
        known = self.places.get(id(node))
        if known is None:
            known = self.places[id(node)] = Place(node, subject, of.origin, guarded)
        elif known.origin is Origin.LOOKALIKE:
            known.origin = of.origin
        known.guarded = known.guarded or guarded
        return known

    # What the calls of `calls.py` need

    def mapped(self, place_node: cst.BaseExpression, of: Value | None) -> Number | None:
        """`map(torch.numel, tensors)`: one place, without an expression for the tensor."""
        found = tensor(of)
        if found is None:
            return None
        place = self._place(place_node, None, found)
        return Number((place,), trainable=found.trainable or self._trainable > 0)

    def apply(self, function: cst.BaseExpression, given: Sequence[Value | None], scope: Scope) -> Value | None:
        """What `function` gives for `given`: a lambda or a function of this source."""
        if isinstance(function, cst.Lambda):
            return self._apply(function, given, scope).returns
        value = self.value(function, scope)
        return self.receive(value, given, {}) if isinstance(value, Function) else None

    def receive(
        self, function: Function, given: Sequence[Value | None], named: dict[str, Value | None], method: bool = False
    ) -> Value | None:
        """Note what a call hands to a function of this source; give back what the function is known to return."""
        parameters = [parameter.name.value for parameter in _parameters(function.node.params)]
        positional = parameters[1:] if method else parameters
        for name, value in [*zip(positional, given, strict=False), *named.items()]:
            if value is not None and name in parameters:
                function.received.setdefault(name, value)
        return function.returns

    def add_up(self, found: Number, node: cst.CSTNode) -> Number:
        """Note that `found` is added up by `node`; the sum is a number that knows its uses."""
        if not found.places:
            return found
        uses = []
        for place in found.places:
            trainable = found.trainable or self._trainable > 0
            use = place.uses.get(id(node))
            if use is None:
                use = place.uses[id(node)] = Use(trainable, memory=found.memory)
            use.trainable = trainable
            uses.append(use)
        self._made += uses
        return Number(uses=(*found.uses, *uses), memory=found.memory)

    def _add_up(self, number: Number, node: cst.CSTNode, target: cst.BaseExpression) -> None:
        if self._is_offset(target):
            return
        total = calls.in_memory(self.add_up(number, node)) if _is_bytes(target) else self.add_up(number, node)
        name = dotted(target.value if isinstance(target, cst.Subscript) else target)
        if name is not None:
            self._totals.setdefault(name, []).extend(total.uses)

    def _is_offset(self, target: cst.BaseExpression) -> bool:
        """Whether what is added to is a position in a flat buffer: by its name, or because it cuts slices."""
        name = dotted(target.value if isinstance(target, cst.Subscript) else target)
        if name is None:
            return False
        if OFFSETS & set(name.rpartition(".")[2].lower().split("_")):
            return True
        last = name.rpartition(".")[2]
        return any(
            isinstance(below, cst.Slice) and names(below, last) for loop in self._loops[-1:] for below in walk(loop)
        )

    # Names, guards and filters

    def _bind(self, target: cst.CSTNode, value: Value | None, scope: Scope) -> None:
        name = dotted(target)
        if name is not None:
            scope.put(name, value)
        elif isinstance(target, (cst.Tuple, cst.List)):
            items = value.items if isinstance(value, Items) else ()
            for i, one in enumerate(target.elements):
                self._bind(one.value, items[i] if i < len(items) else _spread(value), scope)
        elif isinstance(target, cst.Subscript):
            self.value(target, scope)
            self.collect(target.value, value, scope, lookup=True)

    def collect(self, container: cst.BaseExpression, value: Value | None, scope: Scope, lookup: bool = False) -> None:
        """`container.append(value)` and `container[key] = value`."""
        value = self._kept(value)
        if value is None or not (has_tensor(value) or isinstance(value, Number) or _counts(value)):
            return
        name = dotted(container)
        if name is not None:
            before = scope.get(name)
            if not isinstance(before, Store) or before.origin is Origin.LOOKALIKE:
                of = before.of if isinstance(before, (Each, Lookup)) else None
                joined = either(of, value) or value
                scope.put(name, Lookup(joined) if lookup else Each(joined))
        elif isinstance(container, cst.Subscript):
            self.collect(container.value, value if lookup else Each(value), scope, lookup=True)
        elif isinstance(container, cst.Call) and called(container) == "setdefault":
            assert isinstance(container.func, cst.Attribute)
            self.collect(container.func.value, value if lookup else Each(value), scope, lookup=True)

    def _is_guarded(self, node: cst.CSTNode) -> bool:
        if not self._guard_words:
            return False
        known = self._guarded_nodes.get(id(node))
        if known is None:
            known = any(guard in word for word in words(node) for guard in self._guard_words)
            self._guarded_nodes[id(node)] = known
        return known

    @contextmanager
    def _guarding(self, node: cst.CSTNode, of: Value | None) -> Iterator[None]:
        with self._guarded(has_tensor(of) and self._is_guarded(node)):
            yield

    @contextmanager
    def _guarded(self, guarded: bool) -> Iterator[None]:
        self._guards.append(guarded)
        yield
        self._guards.pop()

    @contextmanager
    def _filtering(self, trainable: bool) -> Iterator[None]:
        self._trainable += trainable
        yield
        self._trainable -= trainable


def _parameters(node: cst.Parameters) -> list[cst.Param]:
    return [*node.posonly_params, *node.params, *node.kwonly_params]


def _lookalike(name: str) -> Value | None:
    return Store(Origin.LOOKALIKE, iterable=True) if PARAMETER_LIKE.fullmatch(name.lower()) else None


def _group(index: cst.BaseSlice) -> Value | None:
    """`group["params"]` of an optimizer."""
    key = index.value if isinstance(index, cst.Index) else None
    if isinstance(key, cst.SimpleString) and key.value.strip("'\"") == "params":
        return Store(Origin.LOOKALIKE, iterable=True)
    return None


def _item(items: tuple[Value | None, ...], index: cst.BaseExpression) -> Value | None:
    position = number(index)
    if position is None or not -len(items) <= position < len(items):
        return None
    return items[int(position)]


def _spread(value: Value | None) -> Value | None:
    """What each name gets when something other than a tuple is unpacked."""
    return element(value) if isinstance(value, Each) else None


def _shape(value: Value | None) -> str:
    """What kind of value it is, for comparison between runs; functions are known from the start."""
    return "" if value is None or isinstance(value, (Function, Store)) else type(value).__name__


def _counts(value: Value | None) -> bool:
    match value:
        case Number():
            return True
        case Each(of) | Lookup(of):
            return _counts(of)
        case Items(items):
            return any(_counts(item) for item in items)
    return False


def _at(loop: cst.CSTNode, of: Value | None, target: cst.CSTNode | None = None) -> Value | None:
    """What a loop gives; a tuple of `named_parameters()` remembers the variable that holds it."""
    name = loop.target if isinstance(loop, cst.For) else target
    if isinstance(of, Items) and of.named and isinstance(name, cst.Name):
        return replace(of, target=name, loop=loop)
    return of


def _is_bytes(target: cst.BaseExpression) -> bool:
    name = dotted(target)
    return name is not None and calls.BYTES_NAME.search(name.rpartition(".")[2]) is not None


def _adds_to(target: cst.BaseExpression, expression: cst.BaseExpression) -> bool:
    """`total = total + x`, `d[k] = d.get(k, 0) + x`: the target is part of the sum."""
    if not isinstance(expression, cst.BinaryOperation) or not isinstance(expression.operator, (cst.Add, cst.Subtract)):
        return False
    root = target.value if isinstance(target, cst.Subscript) else target
    name = dotted(root)
    return name is not None and any(dotted(below) == name for below in walk(expression))


def _leaves(body: cst.BaseSuite) -> bool:
    """Whether control never reaches the end of `body`."""
    last = body.body[-1] if body.body else None
    if isinstance(last, cst.SimpleStatementLine):
        last = last.body[-1]
    return isinstance(last, (cst.Continue, cst.Break, cst.Return, cst.Raise))


def _skips_frozen(node: cst.If) -> bool:
    return requires_grad(node.test) is False and node.orelse is None and _leaves(node.body)


Handler = Callable[[Flow, Any, Scope], Any]
_STATEMENTS: dict[type[cst.CSTNode], Handler] = {
    cst.SimpleStatementLine: Flow._block,
    cst.IndentedBlock: Flow._block,
    cst.SimpleStatementSuite: Flow._block,
    cst.Assign: Flow._assign,
    cst.AnnAssign: Flow._annotated,
    cst.AugAssign: Flow._augmented,
    cst.For: Flow._for,
    cst.While: Flow._while,
    cst.If: Flow._if,
    cst.Else: Flow._else,
    cst.Finally: Flow._else,
    cst.With: Flow._with,
    cst.Del: Flow._delete,
    cst.Return: Flow._return,
    cst.FunctionDef: Flow._define,
    cst.ClassDef: Flow._class,
}
_EXPRESSIONS: dict[type[cst.CSTNode], Handler] = {
    cst.Name: Flow._name,
    cst.Attribute: Flow._attribute,
    cst.Subscript: Flow._subscript,
    cst.Tuple: Flow._sequence,
    cst.List: Flow._sequence,
    cst.Set: Flow._sequence,
    cst.Dict: Flow._dict,
    cst.GeneratorExp: Flow._comprehension,
    cst.ListComp: Flow._comprehension,
    cst.SetComp: Flow._comprehension,
    cst.DictComp: Flow._dict_comprehension,
    cst.IfExp: Flow._conditional,
    cst.BooleanOperation: Flow._boolean,
    cst.BinaryOperation: Flow._binary,
    cst.Await: Flow._passed,
    cst.NamedExpr: Flow._walrus,
    cst.Lambda: Flow._lambda,
    cst.Yield: Flow._yield,
    cst.Call: Flow._call,
}
