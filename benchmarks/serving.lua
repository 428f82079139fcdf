-- wrk's side of benchmarks/serving.py: POST a different body each time, and say in one line of JSON what came back.
-- wrk ... -s serving.lua URL -- BODIES: a file of one JSON body a line.

local n_threads = 0

function setup(thread)
  thread:set("number", n_threads)
  n_threads = n_threads + 1
end

function init(args)
  wrk.headers["Content-Type"] = "application/json"
  requests = {}
  for line in io.lines(args[1]) do
    requests[#requests + 1] = wrk.format("POST", nil, nil, line)
  end
  at = number * 997  -- threads do not ask the same at the same time
end

function request()
  at = at + 1
  return requests[at % #requests + 1]
end

function done(summary, latency, _)
  local e = summary.errors
  io.write(string.format(
    '{"requests": %d, "seconds": %.6f, "p50": %.3f, "p99": %.3f, "p999": %.3f, "max": %.3f, '
      .. '"connect": %d, "read": %d, "write": %d, "timeout": %d, "status": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    latency:percentile(99.9) / 1e3, latency.max / 1e3, e.connect, e.read, e.write, e.timeout, e.status
  ))
end
