#!/usr/bin/env bash
# tests/run_pytest.sh ENVIRONMENT FILE… [pytest arguments]: runs pytest in a private Python environment.
# ctest takes exit status 77 as "skipped".
set -euo pipefail
environment=$1
shift
if [ ! -x "$environment/bin/pytest" ]; then
  flag=$([[ $environment == *-interop ]] && echo " --interop" || true)
  echo "Skipped: no $environment; tools/python_env.sh$flag makes it." >&2
  [ -z "${QUANTMILL_REQUIRE_PYTHON:-}" ] || exit 1
  exit 77
fi
exec "$environment/bin/python" -m pytest -ra --durations=5 -p no:cacheprovider "$@"
