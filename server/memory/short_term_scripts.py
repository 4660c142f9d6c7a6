"""What Redis does in one step: each script is atomic, and all its keys belong to one user.

Expiry goes by the clock of Redis, as Redis itself does. Whatever reads or adds sizes first sweeps
what has expired by itself, so that the sum of them never drifts. When Redis is full, it refuses a
script at its first write that adds something, never in the middle.

KEYS[1] is what all keys of the user begin with.
"""

from typing import Final

_COMMON: Final = """
local user = KEYS[1]
local time = redis.call('TIME')
local microseconds = time[1] * 1000000 + time[2]
local now = math.floor(microseconds / 1000)
local index, sizes = user .. 'shorts', user .. 'short-sizes'

local function live_until(key, expiry)
    if redis.call('PEXPIRETIME', key) < expiry then redis.call('PEXPIREAT', key, expiry) end
end

-- The time, so that it is never a number that it was before: not even when Redis crashed and
-- came back with what it had a second earlier.
local function changed()
    local version = tonumber(redis.call('GET', user .. 'shorts-version') or 0) + 1
    version = string.format('%.0f', math.max(version, microseconds))
    redis.call('SET', user .. 'shorts-version', version, 'PX', 691200000)
end

local function total(name)
    return tonumber(redis.call('HGET', sizes, name) or 0)
end

local function resize(name, id, size)
    local before = tonumber(redis.call('HGET', sizes, id) or 0)
    redis.call('HINCRBY', sizes, name, size - before)
    if size == 0 then redis.call('HDEL', sizes, id) else redis.call('HSET', sizes, id, size) end
end

local function forget(id)
    redis.call('ZREM', index, id)
    resize('bytes', id, 0)
    resize('past', 'past:' .. id, 0)
end

local function sweep()
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', now)) do forget(id) end
end

local function remove(id)
    local key = user .. 'short:' .. id
    local place = redis.call('HGET', key, 'place')
    if place and redis.call('GET', user .. 'text:' .. place) == id then
        redis.call('DEL', user .. 'text:' .. place)
    end
    forget(id)
    redis.call('DEL', user .. 'past:' .. id)
    return redis.call('DEL', key)
end

local function entry(id)
    local key = user .. 'short:' .. id
    local values = redis.call('HMGET', key, 'body', 'version', 'used', 'seen', 'feedback', 'useful',
                              'retrieved')
    if not values[1] then return false end
    table.insert(values, redis.call('PEXPIRETIME', key))
    table.insert(values, 1, id)
    return values
end

local function holder(place)
    local id = redis.call('GET', user .. 'text:' .. place)
    return id and redis.call('EXISTS', user .. 'short:' .. id) == 1 and id
end

local function put(id, body, seen, place, size, expiry)
    local key = user .. 'short:' .. id
    redis.call('HSET', key, 'body', body, 'version', 1, 'used', 0, 'seen', seen, 'place', place)
    redis.call('PEXPIREAT', key, expiry)
    redis.call('SET', user .. 'text:' .. place, id, 'PXAT', expiry)
    redis.call('ZADD', index, expiry, id)
    resize('bytes', id, size)
    live_until(index, expiry)
    live_until(sizes, expiry)
end

-- Returns the first place of a conversation that is free: not before `least`.
local function next_position(session, least)
    return math.max(tonumber(redis.call('GET', user .. 'session:' .. session) or 0), least)
end

local function set_next_position(session, position, expiry)
    local key = user .. 'session:' .. session
    redis.call('SET', key, string.format('%.0f', position), 'KEEPTTL')
    live_until(key, expiry)
end
"""

CREATE: Final = (
    _COMMON
    + """
local id, body, seen, place = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local size, limit, lifetime = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local session, position, request = ARGV[8], tonumber(ARGV[9]), ARGV[10]
sweep()
local function remember(outcome, which)
    if request == '' then return end
    redis.call('SET', user .. 'create:' .. request, outcome .. which, 'PX', lifetime)
end
local before = request ~= '' and redis.call('GET', user .. 'create:' .. request)
if before then
    local outcome, which = string.match(before, '^(%a+):(.+)$')
    local made = entry(which)
    if made then return {outcome, total('bytes'), made} end
end
local first = holder(place)
if first then
    redis.call('HINCRBY', user .. 'short:' .. first, 'used', 1)
    redis.call('HSET', user .. 'short:' .. first, 'seen', seen)
    remember('seen:', first)
    changed()
    return {'seen', total('bytes'), entry(first)}
end
if total('bytes') + size > limit then return {'full', total('bytes')} end
remember('created:', id)
put(id, body, seen, place, size, now + lifetime)
if session ~= '' then
    set_next_position(session, next_position(session, position + 1), now + lifetime)
end
changed()
return {'created', total('bytes'), entry(id)}
"""
)
"""Keep a memory, or count the one with the same text at the same place as seen again.

Not twice for one request: what the first try did is the answer to the next.
"""

APPEND: Final = (
    _COMMON
    + """
local seen, limit, lifetime = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local session, least, request = ARGV[4], tonumber(ARGV[5]), ARGV[6]
local first = request ~= '' and redis.call('GET', user .. 'append:' .. request)
if first then return {'repeated', 0, first} end
sweep()
local turns, size = {}, 0
for place = 7, #ARGV, 4 do
    local turn = {ARGV[place], ARGV[place + 1], ARGV[place + 2], tonumber(ARGV[place + 3])}
    turns[#turns + 1], size = turn, size + turn[4]
end
if total('bytes') + size > limit then return {'full', total('bytes')} end
local position, expiry = next_position(session, least), now + lifetime
if position + #turns > 2147483648 then return {'far', 0} end
local entries = {}
for place, turn in ipairs(turns) do
    local at = string.format('%.0f', position + place - 1)
    local body = '{"session_position": ' .. at .. ', ' .. turn[2]
    put(turn[1], body, seen, turn[3] .. '|' .. at .. '|' .. session, turn[4], expiry)
    entries[place] = entry(turn[1])
end
set_next_position(session, position + #turns, expiry)
if request ~= '' then
    redis.call('SET', user .. 'append:' .. request, turns[1][1], 'PXAT', expiry)
end
changed()
return {'created', total('bytes'), entries}
"""
)
"""Keep turns at the next places of a conversation, all or none; not twice for one request."""

UPDATE: Final = (
    _COMMON
    + """
local id, expected, body, place = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local size, limit, past = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
local key, list = user .. 'short:' .. id, user .. 'past:' .. id
sweep()
local version, at = unpack(redis.call('HMGET', key, 'version', 'place'))
if not version then return {'missing', 0} end
if version ~= expected then return {'stale', 0} end
if place ~= at then
    local taken = holder(place)
    if taken and taken ~= id then return {'taken', 0} end
end
local before = tonumber(redis.call('HGET', sizes, id) or 0)
if size > before and total('bytes') + size - before > limit then
    return {'full', total('bytes')}
end
local expiry = redis.call('PEXPIRETIME', key)
-- First of all, because it is refused when Redis is full, and taking away is not.
redis.call('HSET', key, 'body', body, 'place', place)
redis.call('HINCRBY', key, 'version', 1)
if place ~= at then
    if at and redis.call('GET', user .. 'text:' .. at) == id then
        redis.call('DEL', user .. 'text:' .. at)
    end
    redis.call('SET', user .. 'text:' .. place, id, 'PXAT', expiry)
end
redis.call('RPUSH', list, past)
redis.call('PEXPIREAT', list, expiry)
local kept = tonumber(redis.call('HGET', sizes, 'past:' .. id) or 0)
resize('past', 'past:' .. id, kept + before)
while total('past') > limit do
    local oldest = redis.call('LPOP', list)
    if not oldest then break end
    kept = tonumber(redis.call('HGET', sizes, 'past:' .. id) or 0)
    resize('past', 'past:' .. id, math.max(kept - tonumber(string.match(oldest, '^%d+')), 0))
end
resize('bytes', id, size)
changed()
return {'changed', total('bytes'), entry(id)}
"""
)
"""Change a memory that is still at a version, and keep what it was."""

RATE: Final = (
    _COMMON
    + """
local key = user .. 'short:' .. ARGV[1]
local seen = redis.call('HGET', key, 'seen')
if not seen then return false end
if ARGV[2] ~= '' then redis.call('HSET', key, 'feedback', ARGV[2]) end
redis.call('HINCRBY', key, 'useful', ARGV[3])
if tonumber(seen) < tonumber(ARGV[4]) then redis.call('HSET', key, 'seen', ARGV[4]) end
changed()
return entry(ARGV[1])
"""
)
"""Note what a memory is worth."""

COUNT: Final = """
local key = KEYS[1] .. 'short:' .. ARGV[1]
if redis.call('EXISTS', key) == 0 then return 0 end
redis.call('HINCRBY', key, 'retrieved', ARGV[2])
return 1
"""
"""Add to how often queries returned a memory; 0 if it is not there.

No version changes: no answer tells of it.
"""

REMOVE: Final = (
    _COMMON
    + """
local removed = 0
for _, id in ipairs(ARGV) do removed = removed + remove(id) end
sweep()
changed()
return removed
"""
)
"""Remove memories with what they were, if they are there."""

SOME: Final = (
    _COMMON
    + """
local entries = {}
for place, id in ipairs(ARGV) do entries[place] = entry(id) end
return entries
"""
)
"""Return memories by their ids; nil for each that is not there."""

ALL: Final = (
    _COMMON
    + """
local version = redis.call('GET', user .. 'shorts-version')
if version and version == ARGV[1] then return false end
local entries = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', index, '(' .. now, '+inf')) do
    local one = entry(id)
    if one then entries[#entries + 1] = one end
end
return {version, entries}
"""
)
"""Return all memories and the version of them; nil if that is as it was."""

USAGE: Final = (
    _COMMON
    + """
sweep()
return {total('bytes'), redis.call('ZCARD', index)}
"""
)
"""Return the sum of all sizes, and how many memories there are."""
