"""The update stream in Redis: what many servers write of it, in any order.

Each partition has its positions beside its stamps: how far its rows follow each
partition of the stream. All servers that share Redis write what they read of it, in
pieces of their own; the script refuses a piece that brings nothing newer.

Invariant: rows, stamps and position of a partition change at once. The rows are those
of a server that has applied the stream up to the position, but for what was evicted.
"""

from __future__ import annotations

from hps_numba.tiers.redis.scripts import HEAD

_STREAM = """
local function at(text)
  local offset, record = string.match(text, '(%d+):(%d+)')
  return tonumber(offset), tonumber(record)
end
local function before(a, b)
  local offset, record = at(a)
  local other, its_record = at(b)
  return offset < other or offset == other and record < its_record
end
local function place(stream, partition, position)
  local name = ' ' .. partition .. '='
  local new, n = string.gsub(stream, name .. '%S+', name .. position)
  return n > 0 and new or stream .. name .. position
end
"""

WRITTEN, KNOWN, GAP = 1, 0, -1  # what APPLY answers

APPLY = (
    HEAD
    + _STREAM
    + """
local partition, since, till, buckets = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local puts, prefix, use, counts = ARGV[5] == 'put', ARGV[6], ARGV[7], ARGV[8] == '1'
local first, many = 9, 2048
local stream = redis.call('HGET', KEYS[1], 'stream') or ''
local known = string.match(stream, ' ' .. partition .. '=(%S+)')
local done = 1
if known and not before(known, till) then done = 0
elseif known and before(known, since) then done = -1 end
if done == 1 and ARGV[first] then
  stamp(KEYS[1], buckets)
  for i = first, #ARGV, many do
    local last = math.min(i + many - 1, #ARGV)
    if prefix ~= '' then
      redis.call(puts and 'MSET' or 'DEL', unpack(ARGV, i, last))
    else
      redis.call(puts and 'HSET' or 'HDEL', KEYS[2], unpack(ARGV, i, last))
    end
  end
end
if done == 1 and ARGV[first] and KEYS[3] then
  local skip = #prefix + 1
  for i = first, #ARGV, puts and 2 or 1 do
    local key = string.sub(ARGV[i], skip)
    if not puts then redis.call('HDEL', KEYS[3], key)
    elseif use == '0' then redis.call('HSETNX', KEYS[3], key, use)
    else redis.call('HSET', KEYS[3], key, use) end
  end
end
if done == 1 then
  redis.call('HSET', KEYS[1], 'stream', place(stream, partition, till))
end
local n_rows = 0
if counts then n_rows = redis.call('HLEN', prefix == '' and KEYS[2] or KEYS[3]) end
local epoch = number(redis.call('HGET', KEYS[1], 'epoch'))
if epoch == 0 then epoch = restart(KEYS[1], 0) end
return {done, seen(KEYS[1], epoch), n_rows}
"""
)
"""Write what a span of the stream brings to a partition, unless it is there already.

KEYS: stamps; rows (any key of the slot, if rows are strings); and, if uses are noted,
their hash. ARGV: partition of the stream, where the span begins and ends, buckets to
stamp (none: all), ``put`` or ``drop``, prefix of row keys (empty if rows are fields),
the use to note, and 1 to count rows; then the names of rows, each followed by the row
if it is put.

Returns what was done, what is seen of the partition, and its rows if they were to be
counted. A span is ``KNOWN`` if it ends where the partition is or before, and leaves a
``GAP`` if it begins beyond; then nothing is written. Offsets are compared as numbers of
53 bits.
"""

SEEK = (
    HEAD
    + _STREAM
    + """
if redis.call('HEXISTS', KEYS[1], 'epoch') == 0 then restart(KEYS[1], 0) end
local stream = redis.call('HGET', KEYS[1], 'stream') or ''
for i = 2, #ARGV, 2 do
  if ARGV[1] == 'all' or not string.find(stream, ' ' .. ARGV[i] .. '=', 1, true) then
    stream = place(stream, ARGV[i], ARGV[i + 1])
  end
end
redis.call('HSET', KEYS[1], 'stream', stream)
return seen(KEYS[1], number(redis.call('HGET', KEYS[1], 'epoch')))
"""
)
"""Set positions. KEYS: stamps; ARGV: ``all``, or ``new`` to set only those that are not
there; partitions of the stream and their positions."""
