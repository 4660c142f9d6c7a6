"""Whatever a user can have done is counted, or left out for a reason."""

from typing import Final

import pytest

from server.access import METHODS, REFLECTION, ROLES
from server.billing.plans import METERED, METERS

READING: Final = ("Get", "List", "Watch")

MEMORY: Final = "kimberly.memory.v1.MemoryService"
JOBS: Final = "kimberly.jobs.v1.JobService"
USERS: Final = "kimberly.users.v1.UserService"
AUTH: Final = "kimberly.auth.v1.AuthService"
TENANT: Final = "kimberly.auth.v1.TenantService"
AGENTS: Final = "kimberly.agents.v1.AgentService"
PRIVACY: Final = "kimberly.privacy.v1.PrivacyService"
BILLING: Final = "kimberly.billing.v1.BillingService"

EXCEPTED: Final = {
    f"{MEMORY}/ExportMemories": "reads",
    f"{USERS}/VerifyAuditLog": "reads",
    f"{REFLECTION}/ServerReflectionInfo": "reads",
    f"{JOBS}/CancelJob": "gives back what was asked for",
    f"{JOBS}/CreateSchedule": "the jobs that it makes are counted, one by one",
    f"{JOBS}/PauseSchedule": "as CreateSchedule",
    f"{JOBS}/ResumeSchedule": "as CreateSchedule",
    f"{JOBS}/DeleteSchedule": "as CreateSchedule",
    f"{AGENTS}/RegisterAgent": "a user has few; what it writes and the tasks it runs are counted",
    f"{AGENTS}/DisableAgent": "as RegisterAgent",
    f"{AGENTS}/EnableAgent": "as RegisterAgent",
    f"{AGENTS}/DeleteAgent": "as RegisterAgent",
    f"{AGENTS}/RotateAgentKey": "as RegisterAgent",
    f"{AGENTS}/CancelAgentTask": "gives back what was asked for",
    f"{PRIVACY}/CreateErasure": "a right, and who is erased uses nothing",
    f"{USERS}/UpdateUser": "one row of a user",
    f"{USERS}/UpdateSettings": "one row of a user, and what it reads anew is the mesh's doing",
    f"{USERS}/RecordConsent": "a right",
    f"{BILLING}/ChangeSubscription": "pays for itself",
    f"{AUTH}/LogOutEverywhere": "whoever has used up their plan must be able to be safe",
    f"{AUTH}/RevokeSession": "as LogOutEverywhere",
    f"{AUTH}/ChangePassword": "as LogOutEverywhere",
    f"{AUTH}/RequestEmailVerification": "as LogOutEverywhere",
    f"{AUTH}/CreateApiKey": "a user has few",
    f"{AUTH}/RotateApiKey": "as LogOutEverywhere",
    f"{AUTH}/RevokeApiKey": "as LogOutEverywhere",
    f"{TENANT}/AssignRole": "is about members, who are not counted",
    f"{TENANT}/DisableMember": "as AssignRole",
    f"{TENANT}/EnableMember": "as AssignRole",
    f"{TENANT}/LogOutMember": "as AssignRole",
    f"{TENANT}/CreateInvitation": "as AssignRole",
    f"{TENANT}/RevokeInvitation": "as AssignRole",
    f"{TENANT}/RemoveMember": "as AssignRole",
    f"{AUTH}/AcceptInvitation": "as AssignRole",
    f"{AUTH}/SwitchTenant": "as LogOutEverywhere",
    f"{AUTH}/LeaveTenant": "as CreateErasure: nobody pays for what they let go of",
}
"""What users may call that changes something and is counted as nothing, and why."""

OF_USERS: Final = sorted(method for method, access in METHODS.items() if access in ROLES)


@pytest.mark.parametrize("method", OF_USERS)
def test_a_method_is_counted_or_reads_or_is_excepted_by_name(method: str) -> None:
    reads = method.rpartition("/")[2].startswith(READING)
    assert [method in METERS, reads, method.removeprefix("/") in EXCEPTED].count(True) == 1


def test_what_is_counted_or_excepted_is_there_and_is_a_users() -> None:
    assert METERS.keys() | {f"/{method}" for method in EXCEPTED} <= {*OF_USERS}
    assert {*METERS.values()} <= {*METERED}
