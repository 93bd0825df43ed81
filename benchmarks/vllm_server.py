"""vLLM's own OpenAI server, started from Python: its command fails under the CPU distribution.

  /path/to/env/bin/python -m benchmarks.vllm_server --model DIR --port 8001
"""

import uvloop

if __name__ == "__main__":  # its engine starts processes that import this file
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args()
    validate_parsed_serve_args(args)
    uvloop.run(run_server(args))
