"""What a report says about its figures, as HTML."""

SUMMARY = """The last step of each run. Loss is the mean over its last tenth of steps. Goodput
is the number of steps that count, each once however often a restart repeated it, times their
median time, over the time since the first start."""
LOSS = """Cross-entropy in nats a token, averaged over groups of steps where there are many.
Held-out text is the same at every validation, so its points can be compared along a run, and
between runs with the same data and tokenizer. With different tokenizers compare bits a byte,
which do not depend on how text is cut into tokens. A loss that jumps and comes back is an
unstable step: look at the gradient norm beside it."""
SPEED = """Tokens a second over all ranks, and MFU: the floating-point operations the model
needs for them (forward and backward, nothing counted twice for recomputation), as a share of
what the hardware could do (on a CPU measured at each start, with whatever else ran then). The
bar shows where the time since the first start went. Steps that count are goodput. Compile and
autotune is what the first step of a start took longer than others; save and evaluation stalls
are the time for which checkpoints, and validation, norms and scoring, held training up; redone
steps were lost by a failure, the step that it cut off included; idle is the queue, and what
the scheduler took to start again. What is slower than the median step comes last, with all
that is between steps."""
EVALS = """Scores of checkpoints as <code>rondo eval</code> wrote them; bars are one standard
error. A difference within two of them says little."""
POSITIONS = """Texts longer than those in training, of the newest checkpoint that was scored on
them; the dotted line is the length in training. Loss falls with the tokens before, to where a
model makes no more use of them; a loss that rises beyond the line is a state that collapsed, and
the norm that rises with it shows in which layer. A rank that stops growing is a full state. A
share of the first token that is above a half at the line: a head that has not learnt to forget."""
FORGETTING = """Bits a byte of held-out text of each domain (columns) after each stage (rows);
less is better. Down a column: how a domain fares while the model learns others. A value that
rises below the row of the domain's own stage is forgetting."""
EXPERTS = """The tokens that chose an expert over what it would get if all were chosen alike, at
the steps at which norms are logged: 1 is even, 0 is an expert that nobody asks. One dark row
for the whole run is a dead expert; one bright row is a collapsing router. The curve is the
worst expert of any mixture at every step; with expert parallelism it is what the slowest rank
waits for."""
NORMS = """The gradient's norm before clipping, over all parameters; and root mean squares by
layer, of the residual stream after each block and of the recurrent state after the last token.
Activations that grow with depth are usual, states that grow with time are not: a decay is stuck
near one, or a memory is not normalised."""
RECIPES = """Every key that is not the same in all runs, with the defaults written out."""
