#!/usr/bin/env bash
# Makes the built-in model from nothing: corpus, training, published files. Resumes when started again.
#
#   scripts/python_env.sh && scripts/model/make.sh [train.py's options]
#
# Up to an hour and a half on two cores. Not run by any test: the result is committed in `coordinator/builtin/`.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=target/venv/bin/python
[[ -f target/model/corpus.done ]] || { "$python" scripts/model/corpus.py --out target/model; touch target/model/corpus.done; }
exec "$python" scripts/model/train.py --data target/model --out coordinator/builtin "$@"
