"""Scripts that remove rows of a full partition, and note which rows are used.

What is noted of a row is HugeCTR's: for ``evict_oldest`` the time in s of its last use,
8 raw bytes; for ``evict_least_used`` the number of its uses, in decimal. A script works
on a bounded number of rows, since a server does nothing else meanwhile.
"""

from __future__ import annotations

VICTIMS = 512  # most rows that one call removes
SAMPLE = 2048  # rows that the victims are chosen from
AGED = 512  # rows that one call ages, about

_HEAD = """
local function split(keys)
  local fields = {}
  for i = 1, #keys, 8 do fields[#fields + 1] = string.sub(keys, i, i + 7) end
  return fields
end
local function put(key, given)
  for i = 1, #given, 4000 do
    redis.call('HSET', key, unpack(given, i, math.min(i + 3999, #given)))
  end
end
"""

EVICT = """
local rows_key, uses_key = KEYS[1], KEYS[2]
local goal, most, n_sample = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local policy, cursor, prefix = ARGV[4], ARGV[5], ARGV[6]
local counted = prefix == '' and rows_key or uses_key
local rows, noted = redis.call('HLEN', counted), redis.call('HLEN', uses_key)
local n = math.min(rows - goal, most)
if n <= 0 then return {0, rows, cursor} end

local function sweep()  -- fields without rows, which another server's margin left
  for _, field in ipairs(redis.call('HRANDFIELD', uses_key, most)) do
    if redis.call('HEXISTS', rows_key, field) == 0 then
      redis.call('HDEL', uses_key, field)
    end
  end
end
local function sample()  -- a hash is scanned in an order that the server drew
  local fields, uses = {}, {}
  if rows <= n_sample then cursor = '0' end
  for _ = 1, 4 do
    local want = n_sample - #fields
    local reply = redis.call('HSCAN', uses_key, cursor, 'COUNT', want)
    for i = 1, #reply[2], 2 do
      fields[#fields + 1] = reply[2][i]
      uses[#uses + 1] = reply[2][i + 1]
    end
    cursor = reply[1]
    if #fields >= n_sample or (cursor == '0' and rows <= n_sample) then break end
  end
  return fields, uses
end
local function score(use)
  if not use then return -1 end
  if policy == 'evict_least_used' then return tonumber(use) or 0 end
  return #use == 8 and struct.unpack('<I8', use) or 0
end
local function worst(fields, uses)
  local scores, sorted, victims = {}, {}, {}
  for i = 1, #fields do
    local s = score(uses[i])
    scores[i], sorted[i] = s, s
  end
  table.sort(sorted)
  n = math.min(n, #fields)
  local last, equal = sorted[n], 0
  for i = 1, n do if sorted[i] == last then equal = equal + 1 end end
  for i, s in ipairs(scores) do
    if s == last then equal = equal - 1 end
    if s < last or (s == last and equal >= 0) then victims[#victims + 1] = fields[i] end
  end
  return victims
end

if prefix == '' and noted > rows then sweep() end
local victims
if policy == 'evict_random' then
  victims = redis.call('HRANDFIELD', counted, n)
elseif prefix == '' and noted < rows then
  local fields = redis.call('HRANDFIELD', rows_key, n_sample)
  victims = worst(fields, redis.call('HMGET', uses_key, unpack(fields)))
else
  victims = worst(sample())
end
local removed
if prefix == '' then
  removed = redis.call('HDEL', rows_key, unpack(victims))
else
  local names = {}
  for i, victim in ipairs(victims) do names[i] = prefix .. victim end
  removed = redis.call('DEL', unpack(names))
end
redis.call('HDEL', uses_key, unpack(victims))
return {removed, redis.call('HLEN', counted), cursor}
"""
"""Remove some rows of a partition that has more than a goal.

Victims are those of a sample that were used least, or not for longest; one sample
follows the other through the partition, or is all of it if that is small. First go rows
of which nothing is noted.

KEYS: rows (any key of the slot, if rows are strings), uses. ARGV: rows to leave, most
victims, size of the sample, policy, cursor (any at first), prefix of row keys (empty if
rows are fields). Returns how many rows were removed, how many there are now, and the
next cursor. Rows that are strings are counted by what is noted of them.
"""

ADOPT = (
    _HEAD
    + """
local fields, given = split(ARGV[1]), {}
for i, known in ipairs(redis.call('HMGET', KEYS[1], unpack(fields))) do
  if not known then
    given[#given + 1] = fields[i]
    given[#given + 1] = '0'
  end
end
put(KEYS[1], given)
"""
)
"""Note no use of keys that nothing is noted of: KEYS: uses; ARGV: keys."""

NOTE = (
    _HEAD
    + """
local fields, time, counts, prefix = split(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
local given = {}
for i, known in ipairs(redis.call('HMGET', KEYS[2], unpack(fields))) do
  local field = fields[i]
  if not known then
    local exists
    if prefix == '' then exists = redis.call('HEXISTS', KEYS[1], field)
    else exists = redis.call('EXISTS', prefix .. field) end
    known = exists == 1 and '0'
  end
  if known then
    given[#given + 1] = field
    if counts == '' then given[#given + 1] = time
    else
      local use = (tonumber(known) or 0) + struct.unpack('<I4', counts, i * 4 - 3)
      given[#given + 1] = string.format('%.0f', use)
    end
  end
end
put(KEYS[2], given)
return #given / 2
"""
)
"""Note that keys were used, unless their rows are gone meanwhile.

KEYS: rows (any key of the slot, if rows are strings), uses. ARGV: keys; the time; how
often each was used, 4 bytes each (empty to note the time); prefix of row keys (empty if
rows are fields). Returns how many were noted.
"""

AGE = (
    _HEAD
    + """
local reply, given = redis.call('HSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2]), {}
for i = 1, #reply[2], 2 do
  local use = tonumber(reply[2][i + 1])
  if use and use > 0 then
    given[#given + 1] = reply[2][i]
    given[#given + 1] = string.format('%.0f', math.floor(use / 2))
  end
end
put(KEYS[1], given)
return reply[1]
"""
)
"""Halve some numbers of uses: KEYS: uses; ARGV: cursor, about how many -> the cursor.

A number may be halved twice if the hash grows meanwhile.
"""
